"""The four steps in C++, for tensors on the CPU: see `src/batchnorm/native`.

Here is what those kernels need to know of a tensor: its address, and how its dimensions collapse to
the two layouts that they take, which `View` has.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.activations import NAMES
from batchnorm.kernels.contract import Form, Found, Given, Gradients, Needs
from batchnorm.kernels.eager import Eager
from batchnorm.kernels.memory import is_same_view, may_overlap
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
_POOLED_FROM = 4 << 20  # bytes; smaller results are the allocator's

_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS: dict[str | None, int] = {None: 0, **{n: i for i, n in enumerate(NAMES, start=1)}}
_WIDE = torch.float64
_EAGER = Eager(in_place=True)

if _native is not None:
    _native.limit_buffers(int(float(os.environ.get(POOL_VARIABLE, _POOL_MB)) * 2**20))


def release() -> int:
    """Give the memory of all idle buffers back to the system; return how many bytes that were.

    Example:
        >>> from batchnorm.kernels import native
        >>> native.release() >= 0
        True
    """
    return 0 if _native is None else int(_native.release_buffers())


def instructions() -> list[str]:
    """Return the instruction sets that this processor can run, the one in use first.

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
    return _native is not None and dense and x.dtype in _TYPES


class View(NamedTuple):
    """A batch as N outer positions, C channels and S inner positions.

    Attributes:
        planar: Whether runs are of one channel, `S` contiguous values, or of one position, `C`
            contiguous values; S is then 1.
        N: Number of outer positions.
        C: Number of channels.
        S: Number of inner positions.
        outer: Dimensions that make up N, in the order of memory.
        inner: Dimensions that make up S, likewise.
        channel: The channels' dimension.
    """

    planar: bool
    N: int
    C: int
    S: int
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    channel: int


def _collapsed(shape: tuple[int, ...], strides: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """Return the step of dimensions that are one in memory, the outermost first; -1 if not one."""
    for before, after in pairwise(dims):
        if strides[before] != strides[after] * shape[after]:
            return -1
    return strides[dims[-1]] if dims else 0


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], channel: int) -> View | None:
    """Return how a batch collapses to one of the two layouts, or None if it does not."""
    channel %= len(shape)
    C = shape[channel]
    if 0 in shape:
        positions = math.prod(shape[:channel]) * math.prod(shape[channel + 1 :])
        return View(False, positions, C, 1, (), (), channel)
    dims = tuple(d for d, size in enumerate(shape) if size > 1 and d != channel)
    dims = tuple(sorted(dims, key=lambda d: -strides[d]))
    sizes = [shape[d] for d in dims]
    if (C == 1 or strides[channel] == 1) and _collapsed(shape, strides, dims) >= (
        C if C > 1 else 2
    ):
        return View(False, math.prod(sizes), C, 1, dims, (), channel)
    if C > 1 and strides[channel] == 1 and not dims:
        return View(False, 1, C, 1, (), (), channel)
    for cut in range(len(dims) + 1):  # the inner positions are as many dimensions as collapse
        outer, inner = dims[:cut], dims[cut:]
        if _collapsed(shape, strides, outer) >= 0 and _collapsed(shape, strides, inner) in (0, 1):
            if inner and strides[inner[-1]] != 1:
                continue
            if not inner and dims:
                break
            N, S = math.prod(sizes[:cut]), math.prod(sizes[cut:])
            return View(True, N, C, S, outer, inner, channel)
    return None


@lru_cache(maxsize=4096)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...], view: View) -> tuple[int, int] | None:
    """Return the steps from outer position to the next, and from channel to channel, of a tensor.

    None if its dimensions do not collapse as those of the view.
    """
    if 0 in shape:
        return 0, 0
    outer = _collapsed(shape, strides, view.outer)
    inner = _collapsed(shape, strides, view.inner)
    channel = strides[view.channel] if view.C > 1 else 0
    if outer < 0 or inner < 0:
        return None
    if view.planar:
        return (outer, channel) if inner == 1 or view.S == 1 else None
    return (outer, 0) if channel == 1 or view.C == 1 else None


@lru_cache(maxsize=4096)
def _plan(view: View, dtype: torch.dtype, form: Form) -> Any:
    activation = form.activation
    return _native.Plan(
        view.planar,
        _TYPES[dtype],
        view.N,
        view.C,
        view.S,
        _ACTIVATIONS[activation.name if activation is not None else None],
        0.0 if activation is None or activation.parameter is None else activation.parameter,
        form.eps,
        form.correction,
    )


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
        if x.dtype not in _TYPES:
            return f"it does not take {x.dtype}"
        if x.is_neg():
            return "it does not take a tensor whose sign is pending"
        if type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
            return f"it does not look into {type(x).__name__}"
        if _view(x.shape, x.stride(), form.channel_dim) is None:
            return "neither the channels nor the positions are contiguous in memory"
        return None

    def collect(self, x: Tensor, mask: Tensor | None, form: Form) -> Moments:
        """Return the moments of every channel."""
        moments, _ = _collect(x, None, None, None, None, mask, form)
        return moments

    def normalize(self, given: Given, out: Tensor | None = None) -> Tensor:
        """Return y."""
        x, mean, inverse_std, weight, bias, residual, mask, form = given
        if not _alike(x, residual):
            return _EAGER.normalize(given, out)
        y, weight, bias, residual, mask = _target(x, out, weight, bias, residual, mask)
        statistics = (_wide(mean), _wide(inverse_std), None)
        _forward(x, y, weight, bias, residual, mask, form, statistics, None)
        return _written(y, out)

    def reduce_grad(self, dy: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return the gradients of bias and weight."""
        if not _alike(given.x, given.residual):
            return _EAGER.reduce_grad(dy, given)
        sums = torch.empty_like(given.mean, dtype=_WIDE), torch.empty_like(given.mean, dtype=_WIDE)
        _backward(dy, given, None, None, sums, None, reduce=True)
        return sums

    def apply_grad(
        self, dy: Tensor, given: Given, through: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return dx and dresidual."""
        if not _alike(given.x, given.residual):
            return _EAGER.apply_grad(dy, given, through)
        x = given.x
        dx, dresidual = _output(x), _output(x) if given.form.activation is not None else None
        # what is given was divided by the counts already
        sums = None if through is None else (_wide(through[0]), _wide(through[1]))
        count = None if through is None else 1.0
        undivided = given._replace(form=_uncorrected(given.form))
        _backward(dy, undivided, dx, dresidual, sums, count, reduce=False)
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
        if not _alike(x, residual):
            return _EAGER.forward(x, weight, bias, residual, mask, form, running, out)
        y, weight, bias, residual, mask = _target(x, out, weight, bias, residual, mask)
        if running is None:
            moments, inverse_std = _collect(x, y, weight, bias, residual, mask, form)
            mean = moments.mean
        else:
            moments = None
            mean = torch.empty(_channels(x, form), dtype=_WIDE)
            inverse_std = torch.empty_like(mean)
            statistics = (mean, inverse_std, None)
            _forward(x, y, weight, bias, residual, mask, form, statistics, running)
        return Found(_written(y, out), moments, mean, inverse_std)

    def backward(
        self, dy: Tensor, given: Given, count: Tensor | float | None, needs: Needs
    ) -> Gradients:
        """Return the gradients."""
        x, form = given.x, given.form
        if not _alike(x, given.residual):
            return _EAGER.backward(dy, given, count, needs)
        reduce = needs.weight or needs.bias or (needs.x and count is not None)
        dx = _output(x) if needs.x or (needs.residual and form.activation is not None) else None
        dresidual = _output(x) if needs.residual and form.activation is not None else None
        kind = _WIDE if given.weight is None else given.weight.dtype
        wanted = _WIDE if kind not in (torch.float32, _WIDE) else kind
        gradients = [torch.empty_like(given.mean, dtype=wanted) for _ in range(2 * reduce)]
        number = None if count is None or not reduce else float(count)
        _backward(dy, given, dx, dresidual, None, number, reduce, gradients if reduce else None)
        return Gradients(
            dx,
            gradients[0] if reduce else None,
            gradients[1] if reduce else None,
            dy if dresidual is None and needs.residual else dresidual,
        )


def follow(
    running: tuple[Tensor, Tensor],
    moments: Moments,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
) -> bool:
    """Move the running statistics towards a batch's moments, if these tensors can be: in one call.

    Returns False, and does nothing, if they cannot.
    """
    mean, var = running
    if _native is None or not (moments.mean.is_cpu and moments.mean.dtype == _WIDE):
        return False
    for tensor in (mean, var):
        if type(tensor) is not Tensor or tensor.dtype not in (torch.float32, _WIDE):
            return False
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype != mean.dtype:
            return False
    tracked = num_batches_tracked
    if tracked is not None and not (tracked.is_cpu and tracked.dtype == torch.int64):
        return False
    if mean.is_inference() or mean.requires_grad:
        return False
    _native.follow(
        float(moments.count), mean.numel(), moments.mean.data_ptr(), moments.m2.data_ptr(),
        mean.data_ptr(), var.data_ptr(), _TYPES[mean.dtype],
        math.nan if momentum is None else momentum, 0 if tracked is None else tracked.data_ptr(),
    )  # fmt: skip
    torch.autograd.graph.increment_version((mean, var) if tracked is None else (mean, var, tracked))
    return True


def _collect(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> tuple[Moments, Tensor]:
    """Return the moments and 1 / std of a batch, and write y where there is one."""
    mean = torch.empty(_channels(x, form), dtype=_WIDE)
    inverse_std, m2 = torch.empty_like(mean), torch.empty_like(mean)
    statistics = (mean, inverse_std, m2)
    count = _forward(x, y, weight, bias, residual, mask, form, statistics, None)
    return Moments(int(count) if mask is None else count, mean, m2), inverse_std


def _forward(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    statistics: tuple[Tensor, Tensor, Tensor | None],
    running: tuple[Tensor, Tensor] | None,
) -> float:
    """Run the forward kernels: mean, inverse_std and m2 are written, or read if there is no m2."""
    view = _seen(x, form)
    if residual is not None:
        residual = _fitting(residual, x, view)
    mask = None if mask is None else _positions(mask, x, view)
    weight, bias = _per_channel(weight), _per_channel(bias)
    mean, inverse_std, m2 = statistics
    running_mean, running_var = (None, None) if running is None else running
    if running_mean is not None and running_var is not None:
        running_mean, running_var = running_mean.contiguous(), running_var.contiguous()
        if running_mean.dtype != running_var.dtype:
            running_mean, running_var = running_mean.to(_WIDE), running_var.to(_WIDE)
    return float(_plan(view, x.dtype, form).forward(
        torch.get_num_threads(),
        *_operand(x, view), *_operand(y, view), *_operand(residual, view),
        _address(mask), _address(weight), _type(weight), _address(bias), _type(bias),
        mean.data_ptr(), inverse_std.data_ptr(), _address(m2),
        _address(running_mean), _address(running_var), _type(running_mean),
    ))  # fmt: skip


def _backward(
    dy: Tensor,
    given: Given,
    dx: Tensor | None,
    dresidual: Tensor | None,
    sums: tuple[Tensor, Tensor] | None,
    count: float | None,
    reduce: bool,
    gradients: list[Tensor] | None = None,
) -> None:
    """Run the backward kernels: the sums are written, or read if not `reduce`."""
    x, mean, inverse_std, weight, bias, residual, mask, form = given
    view = _seen(x, form)
    dy = _fitting(dy if dy.dtype == x.dtype else dy.to(x.dtype), x, view)
    if residual is not None:
        residual = _fitting(residual, x, view)
    mask = None if mask is None else _positions(mask, x, view)
    weight, bias, mean, inverse_std = (
        _per_channel(weight), _per_channel(bias), _wide(mean), _wide(inverse_std),
    )  # fmt: skip
    sum_g, sum_g_xhat = (None, None) if sums is None else sums
    dweight, dbias = (None, None) if gradients is None else gradients
    _plan(view, x.dtype, form).backward(
        torch.get_num_threads(),
        *_operand(x, view), *_operand(dy, view), *_operand(dx, view), *_operand(residual, view),
        _address(dresidual), _address(mask),
        _address(weight), _type(weight), _address(bias), _type(bias),
        mean.data_ptr(), inverse_std.data_ptr(),
        reduce, count is not None, count or 0.0, _address(sum_g), _address(sum_g_xhat),
        _address(dweight), _type(dweight), _address(dbias), _type(dbias),
    )  # fmt: skip


def _seen(x: Tensor, form: Form) -> View:
    view = _view(x.shape, x.stride(), form.channel_dim)
    if view is None:
        raise ValueError("a batch that native does not support")
    return view


def _channels(x: Tensor, form: Form) -> int:
    return x.shape[form.channel_dim]


@lru_cache(maxsize=256)
def _uncorrected(form: Form) -> Form:
    return replace(form, correction=0)


def _alike(x: Tensor, other: Tensor | None) -> bool:
    return other is None or other.dtype == x.dtype


def _target(
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return where to write y, and the others apart from it in memory.

    The kernels read x and the residual at a place and then write y there. So y may lie over those,
    but over nothing of which one place is read for another.
    """
    if out is None or not is_same_view(x, out):
        return _output(x), weight, bias, residual, mask
    if residual is not None and not is_same_view(x, residual):
        residual = _apart(x, residual)
    return x, _apart(x, weight), _apart(x, bias), residual, _apart(x, mask)


def _apart(x: Tensor, other: Tensor | None) -> Tensor | None:
    return other.clone() if other is not None and may_overlap(x, other) else other


def _written(y: Tensor, out: Tensor | None) -> Tensor:
    """Return y where it was asked for, and let autograd know what a kernel wrote to."""
    if out is None:
        return y
    if not is_same_view(y, out):
        return out.copy_(y)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _type(tensor: Tensor | None) -> int:
    return 1 if tensor is None else _TYPES[tensor.dtype]


def _wide(values: Tensor) -> Tensor:
    return (
        values
        if values.dtype == _WIDE and values.is_contiguous()
        else values.to(_WIDE).contiguous()
    )


def _per_channel(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.is_contiguous() else values.contiguous()


def _operand(tensor: Tensor | None, view: View) -> tuple[int, int, int]:
    """Return the address and the two steps of a tensor in the shape of the batch."""
    if tensor is None:
        return 0, 0, 0
    steps = _steps(tensor.shape, tensor.stride(), view)
    assert steps is not None  # `_fitting` saw to it
    return tensor.data_ptr(), *steps


def _fitting(tensor: Tensor, x: Tensor, view: View) -> Tensor:
    """Return a tensor, or a copy of it that collapses as the batch does."""
    if _steps(tensor.shape, tensor.stride(), view) is None or tensor.is_neg():
        return torch.empty_like(x).copy_(tensor)
    return tensor


def _positions(mask: Tensor, x: Tensor, view: View) -> Tensor:
    """Return the weights of the positions in the order of the view, in the type of arithmetic."""
    sizes = list(x.shape)
    sizes[view.channel] = 1
    ordered = mask.expand(sizes).permute(
        *view.outer, *view.inner, *(d for d in range(x.ndim) if d not in view.outer + view.inner)
    )
    return ordered.to(_WIDE if x.dtype == _WIDE else torch.float32).contiguous()


@lru_cache(maxsize=4096)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether a tensor fills the memory that it spans, each place once."""
    expected = 1
    for step, size in sorted((step, n) for n, step in zip(shape, strides, strict=True) if n > 1):
        if step != expected:
            return False
        expected *= size
    return 0 not in shape


def _output(x: Tensor) -> Tensor:
    """Return an uninitialized tensor like x: if large, in recycled memory."""
    if x.numel() * x.element_size() < _POOLED_FROM or not _is_dense(x.shape, x.stride()):
        return torch.empty_like(x)
    capsule = _native.make_capsule(_TYPES[x.dtype], x.shape, x.stride())
    result: Tensor = torch.utils.dlpack.from_dlpack(capsule)
    poisoned = torch.are_deterministic_algorithms_enabled()
    if poisoned and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        result.fill_(math.nan)  # as torch.empty does
    return result
