"""The four steps in C++, for tensors on the CPU: see `src/batchnorm/native`.

A batch costs the kernels a few microseconds to ask about, which is much where it is small: so what
batches of one shape and layout have in common is found once, see `Batch`.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.activations import NAMES, Activation, ActivationLike
from batchnorm.kernels.contract import Form, Found, Given, Gradients, Needs
from batchnorm.kernels.layouts import View, fitting, in_order, is_dense, steps_in, view_of
from batchnorm.kernels.memory import apart, are_buffers, is_same_view, written
from batchnorm.moments import Moments

_native: Any = None
_REASON: str | None = None
try:
    # after torch, whose threads it shares; another build can take its place, to be tested
    _native = import_module(os.environ.get("BATCHNORM_NATIVE", "batchnorm.kernels._native"))
except ImportError as error:
    _REASON = f"{error}: the package was installed where there is no C++ compiler, or not compiled"

#: What idle buffers may take at most, in MB; 0 recycles none.
POOL_VARIABLE = "BATCHNORM_POOL_MB"
_POOL_MB = 1024

#: The types that the kernels take, by their numbers there.
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS: dict[str | None, int] = {None: 0, **{n: i for i, n in enumerate(NAMES, start=1)}}
_WIDE = torch.float64
_RUNNING_TYPES = (torch.float32, _WIDE)


def _pool_bytes() -> int:
    """Return what the environment allows idle buffers to take."""
    given = os.environ.get(POOL_VARIABLE, str(_POOL_MB))
    if not given.isdecimal():
        raise ValueError(f"{POOL_VARIABLE} is {given!r}: expected a whole number of MB, 0 or more")
    return int(given) << 20


if _native is not None and getattr(_native, "activations", 0) != len(_ACTIVATIONS):
    _native, _REASON = None, "it was compiled from other sources: install the package again"
if _native is not None and not _native.find_exchange(Tensor, torch.nn.Parameter):
    _native, _REASON = None, f"torch {torch.__version__} does not offer its tensors by DLPack 1.3"
if _native is not None:
    _native.limit_buffers(_pool_bytes())


def release() -> int:
    """Give the memory of all idle buffers back to the system; return how many bytes that were.

    Example:
        >>> from batchnorm.kernels import native
        >>> native.release() >= 0
        True
    """
    return 0 if _native is None else int(_native.release_buffers())


def instructions() -> list[str]:
    """Return the instruction sets that this processor can run, the best, which is used, first.

    Example:
        >>> from batchnorm.kernels import native
        >>> native.instructions()[-1:]
        [...]
    """
    return [] if _native is None else list(_native.instructions())


def takes(x: Tensor) -> bool:
    """Return whether the kernels are there and take tensors like this, whatever their strides.

    Unlike `Native.supports`, a compiler can trace it.
    """
    dense = x.device.type == "cpu" and x.layout is torch.strided
    return _native is not None and dense and x.dtype in TYPES


class Batch(NamedTuple):
    """What batches of one shape, layout and type have in common, in calls of one form.

    Attributes:
        form: Of the calls.
        view: How they collapse to one of the two layouts of the kernels.
        steps: From outer position to outer position, and from channel to channel.
        plan: The kernels, set up for them.
        numbers: A tensor of a number a channel, (C,) or of each group (G, C), for others to be made
            like it.
        dense: Whether they fill the memory that they span, so that results lie as they do.
    """

    form: Form
    view: View
    steps: tuple[int, int]
    plan: Any
    numbers: Tensor
    dense: bool


@lru_cache(maxsize=4096)
def batch_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    channel_dim: int,
    eps: float,
    correction: float,
    activation: ActivationLike,
    ghost_size: int | None,
) -> Batch | None:
    """Return what is needed of such batches, or None if the kernels do not take them.

    The last five are those of a form, which would take as long to make as this takes to look up.
    """
    form = Form(channel_dim, eps, correction, Activation.parse(activation), ghost_size)
    if dtype not in TYPES or not -len(shape) <= channel_dim < len(shape):
        return None
    view = view_of(shape, strides, channel_dim)
    steps = None if view is None else steps_in(shape, strides, view)
    if view is None or steps is None:
        return None
    groups = form.groups(shape)
    number, group = 1, view.N
    if groups is not None and groups.number > 1:
        if view.outer[:1] != (groups.dim,):
            return None
        number, group = groups.number, view.N // groups.examples * groups.size
    name, parameter = (None, None) if form.activation is None else form.activation.pair
    plan = _native.Plan(
        view.planar,
        TYPES[dtype],
        view.N,
        view.C,
        view.S,
        number,
        group,
        _ACTIVATIONS[name],
        parameter or 0.0,
        eps,
        correction,
        shape,
        strides,
        *steps,
    )
    size = (view.C,) if groups is None else (number, view.C)
    numbers = torch.empty(size, dtype=_WIDE, device="cpu")
    return Batch(form, view, steps, plan, numbers, is_dense(shape, strides))


def _seen(x: Tensor, form: Form) -> Batch:
    found = batch_of(x.shape, x.stride(), x.dtype, *form)
    if found is None:
        raise ValueError("a batch that native does not support")
    return found


class Native:
    """The backend in C++, for float64, float32, bfloat16 and float16 on the CPU."""

    name = "native"

    def available(self) -> str | None:
        """Return why the compiled kernels are not there, or None if they are."""
        return _REASON

    def supports(self, x: Tensor, form: Form) -> str | None:
        """Return why it cannot take this batch, or None if it can."""
        if not x.is_cpu or x.layout is not torch.strided:
            return f"it takes dense tensors on the CPU, not {x.layout} on {x.device.type}"
        if x.dtype not in TYPES:
            return f"it does not take {x.dtype}"
        if x.is_neg():
            return "it does not take a tensor whose sign is pending"
        if type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
            return f"it does not look into {type(x).__name__}"
        if batch_of(x.shape, x.stride(), x.dtype, *form) is None:
            if (
                form.ghost_size is not None
                and self.supports(x, form._replace(ghost_size=None)) is None
            ):
                return "the examples, of which groups are made, are not the outermost in memory"
            return "neither the channels nor the positions are contiguous in memory"
        return None

    def collect(self, x: Tensor, mask: Tensor | None, form: Form) -> Moments:
        """Return the moments of every channel."""
        batch = _seen(x, form)
        mean, inverse_std, m2 = (torch.empty_like(batch.numbers) for _ in range(3))
        counts = _forward(batch, x, None, None, None, None, mask, (mean, inverse_std, m2), None)
        return Moments(_count(batch, mask, counts), mean, m2)

    def normalize(self, given: Given, out: Tensor | None = None) -> Tensor:
        """Return y."""
        x, mean, inverse_std, weight, bias, residual, mask, form = given
        batch = _seen(x, form)
        y, weight, bias, residual, mask = _target(x, out, batch, weight, bias, residual, mask)
        statistics = (_wide(mean), _wide(inverse_std), None)
        _forward(batch, x, y, weight, bias, residual, mask, statistics, None)
        return written(y, out)

    def reduce_grad(self, dy: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return the gradients of bias and weight."""
        batch = _seen(given.x, given.form)
        sum_g, sum_g_xhat = torch.empty_like(batch.numbers), torch.empty_like(batch.numbers)
        _backward(batch, dy, given, None, None, (sum_g, sum_g_xhat), None, reduce=True)
        return sum_g, sum_g_xhat

    def apply_grad(
        self, dy: Tensor, given: Given, through: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return dx and dresidual."""
        x, form = given.x, given.form
        # what is given was divided by the counts already
        batch = _seen(x, form._replace(correction=0))
        dx = output_like(x, batch)
        dresidual = output_like(x, batch) if form.activation is not None else None
        sums = None if through is None else (_wide(through[0]), _wide(through[1]))
        counts = None if through is None else [1.0] * len(batch.plan.counts())
        _backward(batch, dy, given, dx, dresidual, sums, counts, reduce=False)
        return dx, dy if dresidual is None else dresidual

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        form: Form,
        running: tuple[Tensor, Tensor] | None,
        out: Tensor | None = None,
    ) -> Found:
        """Return y and what normalized it."""
        batch = _seen(x, form)
        if out is None:
            y = output_like(x, batch)
        else:
            y, weight, bias, residual, mask = _target(x, out, batch, weight, bias, residual, mask)
        mean, inverse_std = torch.empty_like(batch.numbers), torch.empty_like(batch.numbers)
        m2 = torch.empty_like(mean) if running is None else None
        moments = None
        statistics = (mean, inverse_std, m2)
        counts = _forward(batch, x, y, weight, bias, residual, mask, statistics, running)
        if m2 is not None:
            moments = Moments(_count(batch, mask, counts), mean, m2)
        return Found(y if out is None else written(y, out), moments, mean, inverse_std)

    def backward(
        self, dy: Tensor, given: Given, count: Tensor | float | None, needs: Needs
    ) -> Gradients:
        """Return the gradients."""
        x, weight, form = given.x, given.weight, given.form
        batch = _seen(x, form)
        reduce = needs.weight or needs.bias or (needs.x and count is not None)
        through_z = needs.residual and form.activation is not None
        dx = dresidual = dweight = dbias = None
        if needs.x or through_z:
            dx = output_like(x, batch)
        if through_z:
            dresidual = output_like(x, batch)
        if reduce:
            kind = _WIDE if weight is None else weight.dtype
            kind = kind if kind in _RUNNING_TYPES else _WIDE
            dweight = torch.empty(batch.view.C, dtype=kind, device="cpu")
            dbias = torch.empty_like(dweight)
        counts: list[float] | None = None
        if count is not None and reduce:
            counts = count.flatten().tolist() if isinstance(count, Tensor) else [float(count)]
        _backward(batch, dy, given, dx, dresidual, None, counts, reduce, dweight, dbias)
        return Gradients(
            dx, dweight, dbias, dy if dresidual is None and needs.residual else dresidual
        )


def follow(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
) -> bool:
    """Move the running statistics towards a batch's moments, if these tensors can be: in one call.

    Returns False, and does nothing, if they cannot.
    """
    mean, m2 = moments.mean, moments.m2
    if _native is None or not (mean.is_cpu and mean.dtype is _WIDE):
        return False
    if not are_buffers(running_mean, running_var, num_batches_tracked):
        return False
    moved: bool = _native.follow(
        float(moments.count), mean.numel(), mean.data_ptr(), m2.data_ptr(), running_mean,
        running_var, math.nan if momentum is None else momentum, num_batches_tracked,
    )  # fmt: skip
    if moved:
        mark_written(running_mean, running_var, num_batches_tracked)
    return moved


def mark_written(mean: Tensor, var: Tensor, tracked: Tensor | None) -> None:
    """Let autograd know that running statistics were written over."""
    written = (mean, var) if tracked is None else (mean, var, tracked)
    torch.autograd.graph.increment_version(written)


def _forward(
    batch: Batch,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor | None],
    running: tuple[Tensor, Tensor] | None,
) -> list[float]:
    """Run the forward kernels: mean, inverse_std and m2 are written, or read if there is no m2.

    Returns the counts that were counted, one a group.
    """
    if residual is not None:
        residual = fitting(residual, x, batch.view)
    mask = None if mask is None else in_order(mask, x, batch.view)
    weight, bias = _per_channel(weight), _per_channel(bias)
    mean, inverse_std, m2 = statistics
    running_mean, running_var = (None, None) if running is None else running
    if running_mean is not None and running_var is not None:
        if running_mean.dtype is not running_var.dtype or running_mean.dtype not in TYPES:
            running_mean, running_var = running_mean.to(_WIDE), running_var.to(_WIDE)
        running_mean = running_mean.resolve_neg().contiguous()
        running_var = running_var.resolve_neg().contiguous()
    strides = x.stride()
    counts: list[float] = batch.plan.forward(
        torch.get_num_threads(), x.data_ptr(), *batch.steps,
        *_operand(y, strides, batch), *_operand(residual, strides, batch),
        _address(mask), _address(weight), _type(weight), _address(bias), _type(bias),
        mean.data_ptr(), inverse_std.data_ptr(), _address(m2),
        _address(running_mean), _address(running_var), _type(running_mean),
    )  # fmt: skip
    return counts


def _count(batch: Batch, mask: Tensor | None, counts: list[float]) -> Tensor | float:
    """Return the count of moments: a number, or (G, 1) of groups."""
    if batch.numbers.ndim > 1:
        return torch.tensor(counts, dtype=_WIDE, device="cpu").unsqueeze(1)
    return batch.view.N * batch.view.S if mask is None else counts[0]


def _backward(
    batch: Batch,
    dy: Tensor,
    given: Given,
    dx: Tensor | None,
    dresidual: Tensor | None,
    sums: tuple[Tensor, Tensor] | None,
    counts: list[float] | None,
    reduce: bool,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Run the backward kernels: the sums are written, or read if not `reduce`."""
    x, mean, inverse_std, weight, bias, residual, mask, _ = given
    strides = x.stride()
    if dy.dtype is not x.dtype or dy.stride() != strides or dy.is_neg():
        dy = fitting(dy.to(x.dtype), x, batch.view)
    if residual is not None:
        residual = fitting(residual, x, batch.view)
    mask = None if mask is None else in_order(mask, x, batch.view)
    weight, bias, mean, inverse_std = (
        _per_channel(weight), _per_channel(bias), _wide(mean), _wide(inverse_std),
    )  # fmt: skip
    sum_g, sum_g_xhat = (None, None) if sums is None else sums
    batch.plan.backward(
        torch.get_num_threads(), x.data_ptr(), *batch.steps,
        *_operand(dy, strides, batch), *_operand(dx, strides, batch),
        *_operand(residual, strides, batch), _address(dresidual), _address(mask),
        _address(weight), _type(weight), _address(bias), _type(bias),
        mean.data_ptr(), inverse_std.data_ptr(),
        reduce, counts or [], _address(sum_g), _address(sum_g_xhat),
        _address(dweight), _type(dweight), _address(dbias), _type(dbias),
    )  # fmt: skip


def _target(
    x: Tensor,
    out: Tensor | None,
    batch: Batch,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return where to write y, and the others apart from it in memory."""
    if out is None or not is_same_view(x, out):
        return output_like(x, batch), weight, bias, residual, mask
    return x, *apart(x, weight, bias, residual, mask)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _type(tensor: Tensor | None) -> int:
    return 1 if tensor is None else TYPES[tensor.dtype]


def _wide(values: Tensor) -> Tensor:
    return (
        values
        if values.dtype == _WIDE and values.is_contiguous()
        else values.to(_WIDE).contiguous()
    )


def _per_channel(values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    values = values.resolve_neg()
    if values.is_contiguous() and values.dtype in TYPES:
        return values
    return values.to(values.dtype if values.dtype in TYPES else _WIDE).contiguous()


def _operand(tensor: Tensor | None, strides: tuple[int, ...], batch: Batch) -> tuple[int, int, int]:
    """Return the address and the two steps of a tensor in the shape of the batch.

    `strides` are those of the batch itself.
    """
    if tensor is None:
        return 0, 0, 0
    own = tensor.stride()
    steps = batch.steps if own == strides else steps_in(tensor.shape, own, batch.view)
    assert steps is not None  # `fitting` saw to it
    return tensor.data_ptr(), *steps


def output_like(x: Tensor, batch: Batch) -> Tensor:
    """Return an uninitialized tensor like x: if large, in recycled memory."""
    if not batch.dense:
        return torch.empty_like(x)
    try:
        result: Tensor = batch.plan.output()
    except MemoryError:  # or no more mappings: the allocator says it best, if it has none either
        return torch.empty_like(x)
    return result
