"""The four steps in Triton, for tensors on a GPU: which programs are launched, and on what."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.contract import Form, Found, Given, Gradients, Needs
from batchnorm.kernels.layouts import fitting, in_order, steps_in
from batchnorm.kernels.memory import apart, are_buffers, is_same_view, written
from batchnorm.kernels.triton import tuning
from batchnorm.kernels.triton.plan import (
    HELD_BACKWARD,
    HELD_FORWARD,
    Batch,
    Cut,
    alignment,
    batch_of,
    candidates,
    is_far,
    multiprocessors,
    piece_of,
    reckoned,
)
from batchnorm.moments import Moments

#: The types that the programs take.
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The least compute capability that Triton compiles for.
CAPABILITY = (8, 0)
_WIDE = torch.float64
_GRADIENTS = (torch.float32, _WIDE)
#: Of a thread: with more, too few threads run at once to keep the memory busy.
_REGISTERS = 128
#: Triton's interpreter takes one launch at a time.
_INTERPRETER = Lock()


@cache
def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the programs, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@cache
def _missing() -> str | None:
    """Return why no program can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton, on Linux"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU here that torch can use"
    reasons = [_refusal(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@lru_cache(maxsize=64)
def _refusal(index: int) -> str | None:
    """Return why a GPU cannot run the programs, or None if it can."""
    if torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(index)
    if found >= CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    return (
        f"{name} has compute capability {found[0]}.{found[1]}, and Triton needs "
        f"{CAPABILITY[0]}.{CAPABILITY[1]} or more"
    )


@cache
def _programs() -> tuple[Any, Any, Any]:
    """Import what needs Triton, when it is first used."""
    from batchnorm.kernels.triton import held, running, streaming

    return streaming, held, running


def takes(x: Tensor) -> bool:
    """Return whether a GPU's programs take tensors like this, whatever their strides.

    Unlike `Triton.supports`, a compiler can trace it.
    """
    return x.device.type == "cuda" and x.dtype in TYPES and _missing() is None


def _seen(x: Tensor, form: Form) -> Batch:
    found = batch_of(tuple(x.shape), x.stride(), form.channel_dim, form.ghost_size)
    if found is None:
        raise ValueError("a batch that triton does not support")
    return found


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
    mean, m2, count = moments.mean, moments.m2, moments.count
    kept = [v for v in (running_mean, running_var, num_batches_tracked) if v is not None]
    if not takes(mean) or mean.dtype != _WIDE or mean.ndim != 1 or not are_buffers(*kept):
        return False
    if any(v.device != mean.device or not v.is_contiguous() for v in kept):
        return False
    if running_mean.dtype not in TYPES or running_var.dtype not in TYPES:
        return False
    _launch_follow(mean, m2, _counts(count, mean), running_mean, running_var, momentum,
                   num_batches_tracked)  # fmt: skip
    torch.autograd.graph.increment_version(kept)
    return True


def _launch_follow(
    mean: Tensor,
    m2: Tensor,
    count: Tensor | int,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float | None,
    tracked: Tensor | None,
) -> None:
    rate = momentum or 0.0
    high = struct.unpack("f", struct.pack("f", rate))[0]  # numbers are given in float32
    program, given = _programs()[2].follow, _counted(count)
    with _on(mean):
        program[(1,)](
            mean=mean.contiguous(), m2=m2.contiguous(), **given, running_mean=running_mean,
            running_var=running_var, tracked=tracked, high=high, low=rate - high,
            channels=len(mean), AVERAGE=momentum is None, CHANNELS=1024, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Let programs be launched where a tensor lies."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _INTERPRETER


class Triton:
    """The backend in Triton, for float64, float32, bfloat16 and float16 on NVIDIA and AMD GPUs."""

    name = "triton"

    def available(self) -> str | None:
        """Return why no program can run here, or None if one can."""
        return _missing()

    def supports(self, x: Tensor, form: Form) -> str | None:
        """Return why it cannot take this batch, or None if it can."""
        place = "cpu" if is_interpreted() and x.device.type == "cpu" else "cuda"
        if x.device.type != place or x.layout is not torch.strided:
            return f"it takes dense tensors on a GPU, not {x.layout} on {x.device.type}"
        if place == "cuda" and (reason := _refusal(x.device.index)) is not None:
            return reason
        if x.dtype not in TYPES:
            return f"it does not take {x.dtype}"
        if x.is_neg():
            return "it does not take a tensor whose sign is pending"
        if type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
            return f"it does not look into {type(x).__name__}"
        if batch_of(tuple(x.shape), x.stride(), form.channel_dim, form.ghost_size) is None:
            if form.ghost_size is not None and not self.supports(x, form._replace(ghost_size=None)):
                return "the examples, of which groups are made, are not the outermost in memory"
            return "neither the channels nor the positions are contiguous in memory, or too many"
        return None

    def collect(self, x: Tensor, mask: Tensor | None, form: Form) -> Moments:
        """Return the moments of every channel."""
        batch = _seen(x, form)
        weights = None if mask is None else in_order(mask, x, batch.view)
        return _Forward(x, batch, None, weights, None, None, None, form).collect(_cut(batch, x))[0]

    def normalize(self, given: Given, out: Tensor | None = None) -> Tensor:
        """Return y."""
        x, mean, inverse_std, weight, bias, residual, mask, form = given
        batch = _seen(x, form)
        y, weight, bias, residual, mask = _target(x, out, weight, bias, residual, mask)
        weights = None if mask is None else in_order(mask, x, batch.view)
        call = _Forward(x, batch, y, weights, weight, bias, residual, form)
        call.normalize(_cut(batch, x), _wide(mean), _wide(inverse_std))
        return written(y, out)

    def reduce_grad(self, dy: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return the gradients of bias and weight."""
        call = _Backward(dy, given, Needs(False, False, False, False))
        return call.reduce(_cut(call.batch, given.x))

    def apply_grad(
        self, dy: Tensor, given: Given, through: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return dx and dresidual."""
        # what is given was divided by the counts already
        given = given._replace(form=given.form._replace(correction=0))
        call = _Backward(dy, given, Needs(True, False, False, True))
        sums = None if through is None else (_wide(through[0]), _wide(through[1]))
        call.apply(_cut(call.batch, given.x), sums, 1)
        assert call.dx is not None
        return call.dx, dy if call.dresidual is None else call.dresidual

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
        y, weight, bias, residual, mask = _target(x, out, weight, bias, residual, mask)
        weights = None if mask is None else in_order(mask, x, batch.view)
        call = _Forward(x, batch, y, weights, weight, bias, residual, form)
        if running is not None:
            mean, inverse_std = call.normalize_by(_cut(batch, x), *running)
            return Found(written(y, out), None, mean, inverse_std)
        run = call.whole
        cut = _cut(batch, x, "forward", None if is_same_view(x, y) else run)
        moments, mean, inverse_std = run(cut)
        return Found(written(y, out), moments, mean, inverse_std)

    def backward(
        self, dy: Tensor, given: Given, count: Tensor | float | None, needs: Needs
    ) -> Gradients:
        """Return the gradients."""
        call = _Backward(dy, given, needs)
        x = given.x
        if count is None or not needs.x:  # nothing flows back through the moments
            cut = _cut(call.batch, x)
            if needs.weight or needs.bias:
                call.reduce(cut)
            if call.dx is not None or call.dresidual is not None:
                call.apply(cut, None, 1)
        else:
            known = _counts(count, given.mean)
            call.whole(_cut(call.batch, x, "backward", lambda cut: call.whole(cut, known)), known)
        dresidual = dy if call.dresidual is None and needs.residual else call.dresidual
        return Gradients(call.dx, *call.channels(), dresidual)


def _cut(
    batch: Batch, x: Tensor, direction: str = "", run: Callable[[Cut], object] | None = None
) -> Cut:
    """Return how a batch is cut: as it was tuned, or as is reckoned.

    Args:
        batch: What is cut.
        x: The tensor.
        direction: forward, or backward; or none, for one step of the four.
        run: Does the work by a cut, to be timed; None if that cannot be done more than once.
    """
    held = {"forward": HELD_FORWARD, "backward": HELD_BACKWARD}.get(direction, 0)
    sms = multiprocessors(x.device)
    own = reckoned(batch, x.element_size(), sms, held)
    if not direction:
        return own
    view = batch.view
    key = (
        f"{direction} {'planar' if view.planar else 'interleaved'} {view.N}x{view.C}x{view.S} "
        f"groups {batch.groups} bytes {x.element_size()}"
    )
    if (found := tuning.kept(key, x.device)) is not None:
        return found
    if run is None or not tuning.is_asked_for():
        return own
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return own
    return tuning.fastest(key, x.device, [own, *candidates(batch, x.element_size(), sms, held)], run)


class _Launcher:
    """What the launches of one call have in common."""

    def __init__(
        self, x: Tensor, batch: Batch, form: Form, weights: Tensor | None, *others: Tensor | None
    ) -> None:
        self.x, self.batch, self.form, self.weights = x, batch, form, weights
        view = batch.view
        tensors = [x, *(other for other in others if other is not None)]
        self.steps = {id(t): _steps(t, batch) for t in tensors}
        numbers = [n for pair in self.steps.values() for n in pair]
        self.align = alignment(batch.width, *numbers)
        self.far = is_far(*tensors)
        name, parameter = (None, None) if form.activation is None else form.activation.pair
        self.activation = {"ACTIVATION": name, "PARAMETER": parameter or 0.0}
        self.sizes = {
            "rows": view.N,
            "group": batch.group,
            "groups": batch.groups,
            "channels": view.C,
            "width": batch.width // self.align,
        }

    def at(self, prefix: str, tensor: Tensor | None) -> dict[str, int]:
        """Return the two steps of a tensor under the names that programs have for them."""
        row, unit = (0, 0) if tensor is None else self.steps[id(tensor)]
        return {f"{prefix}_row": row // self.align, f"{prefix}_unit": unit // self.align}

    def new(self, *shape: int, dtype: torch.dtype = _WIDE) -> Tensor:
        """Return an uninitialized tensor beside x."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def numbers(self, how_many: int) -> list[Tensor]:
        """Return uninitialized tensors of a number a channel, (C,), or (G, C) of groups."""
        return [self.new(*self.batch.statistics) for _ in range(how_many)]

    def parts(self, cut: Cut, planes: int) -> dict[str, Any]:
        """Return where programs leave their parts, and count who was there."""
        accumulated = torch.promote_types(self.x.dtype, torch.float32)
        items = self.batch.units(cut.columns) * self.batch.groups
        size = planes * self.batch.groups * cut.programs * self.batch.view.C
        alone = cut.held and cut.programs == 1
        return {
            "parts": None if alone else self.new(size, dtype=accumulated),
            "arrived": None
            if alone
            else torch.zeros(items, dtype=torch.int32, device=self.x.device),
        }

    def launch(self, program: Any, cut: Cut, merges: bool = False, **arguments: Any) -> None:
        """Run a program on the GPU of x."""
        from triton import language

        batch, planar = self.batch, self.batch.view.planar
        items = batch.units(cut.columns) * batch.groups
        programs = items * cut.programs
        if not programs:  # there are no channels
            return
        constants: dict[str, Any] = {
            "PLANAR": planar,
            "FAR": self.far,
            "ALIGN": self.align,
            "ACC": language.float64 if self.x.dtype == _WIDE else language.float32,
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "num_warps": cut.warps,
            "enable_fp_fusion": True,  # or else each product is rounded before it is added
        }
        if self.x.is_cuda and torch.version.hip is None:
            constants["maxnreg"] = _REGISTERS
        if merges:
            constants["PIECE"] = piece_of(cut.columns, planar, cut.programs)
        if cut.held:
            constants["PROGRAMS"] = cut.programs
            if cut.programs > 1:  # they wait for one another: all have to run at once
                room = multiprocessors(self.x.device) // cut.programs
                programs = min(items, max(room, 1)) * cut.programs
                if not is_interpreted():
                    constants["launch_cooperative_grid"] = True
        else:
            constants["splits"] = cut.programs
        given = {"x": self.x, "weights": self.weights, **self.at("x", self.x), **self.sizes}
        with _on(self.x):
            program[(programs,)](**given, **arguments, **constants)


class _Forward(_Launcher):
    """The launches of a forward pass."""

    def __init__(
        self,
        x: Tensor,
        batch: Batch,
        y: Tensor | None,
        weights: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        form: Form,
    ) -> None:
        residual = None if residual is None else fitting(residual, x, batch.view)
        super().__init__(x, batch, form, weights, y, residual)
        self.results = {"y": y, "residual": residual, **self.at("y", y), **self.at("r", residual)}
        self.affine = {"weight": _plain(weight), "bias": _plain(bias)}

    def collect(self, cut: Cut) -> tuple[Moments, Tensor, Tensor]:
        """Return the batch's moments, and by what mean and inverse_std they normalize."""
        mean, inverse_std, m2 = self.numbers(3)
        counts, count = self._counts()
        self.launch(
            _programs()[0].collect, cut, True, mean=mean, inverse_std=inverse_std, m2=m2,
            counts=counts, EPS=self.form.eps, CORRECTION=self.form.correction,
            **self.parts(cut, 4),
        )  # fmt: skip
        return Moments(count, mean, m2), mean, inverse_std

    def normalize(self, cut: Cut, mean: Tensor, inverse_std: Tensor) -> None:
        """Write y, by given numbers."""
        self.launch(
            _programs()[0].normalize, cut, mean=mean, inverse_std=inverse_std, running_var=None,
            kept_mean=None, kept_inverse_std=None, EPS=self.form.eps,
            **self.results, **self.affine, **self.activation,
        )  # fmt: skip

    def normalize_by(self, cut: Cut, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Write y, by running statistics; return copies of what was used."""
        kept, inverse_std = (self.new(self.batch.view.C) for _ in range(2))
        self.launch(
            _programs()[0].normalize, cut, mean=_plain(mean), inverse_std=None,
            running_var=_plain(var), kept_mean=kept, kept_inverse_std=inverse_std,
            EPS=self.form.eps, **self.results, **self.affine, **self.activation,
        )  # fmt: skip
        return kept, inverse_std

    def whole(self, cut: Cut) -> tuple[Moments, Tensor, Tensor]:
        """Write y; return what `collect` does."""
        if not cut.held:
            moments, mean, inverse_std = self.collect(cut)
            self.normalize(cut, mean, inverse_std)
            return moments, mean, inverse_std
        mean, inverse_std, m2 = self.numbers(3)
        counts, count = self._counts()
        self.launch(
            _programs()[1].forward, cut, True, mean=mean, inverse_std=inverse_std, m2=m2,
            counts=counts, EPS=self.form.eps, CORRECTION=self.form.correction,
            **self.parts(cut, 4), **self.results, **self.affine, **self.activation,
        )  # fmt: skip
        return Moments(count, mean, m2), mean, inverse_std

    def _counts(self) -> tuple[Tensor | None, Tensor | float]:
        """Return where counts are to be written, if they are, and the count of the moments."""
        view = self.batch.view
        if len(self.batch.statistics) > 1:
            counts = self.new(self.batch.groups, 1)
            return counts, counts
        if self.weights is None:
            return None, view.N * view.S
        counts = self.new(1)
        return counts, counts[0]


class _Backward(_Launcher):
    """The launches of a backward pass."""

    def __init__(self, dy: Tensor, given: Given, needs: Needs) -> None:
        x, mean, inverse_std, weight, bias, residual, mask, form = given
        batch = _seen(x, form)
        dy = fitting(dy.to(x.dtype), x, batch.view)
        if residual is not None:
            residual = fitting(residual, x, batch.view)
        if form.activation is None:
            residual = None  # nothing depends on it
        weights = None if mask is None else in_order(mask, x, batch.view)
        self.dx = torch.empty_like(x) if needs.x else None
        through_z = needs.residual and form.activation is not None
        self.dresidual = torch.empty_like(x) if through_z else None
        like = self.dx if self.dx is not None else self.dresidual
        super().__init__(x, batch, form, weights, dy, residual, like)
        kind = _WIDE if weight is None or weight.dtype not in _GRADIENTS else weight.dtype
        one = batch.groups == 1
        self.dweight = self.new(batch.view.C, dtype=kind) if one and needs.weight else None
        self.dbias = self.new(batch.view.C, dtype=kind) if one and needs.bias else None
        self.sum_g, self.sum_g_xhat = self.numbers(2)
        self.reduced = False
        self.gradients = {"dx": self.dx, "dresidual": self.dresidual, **self.at("dx", like)}
        self.common = {
            "dy": dy,
            "residual": residual,
            "mean": _wide(mean),
            "inverse_std": _wide(inverse_std),
            "weight": _plain(weight),
            "bias": _plain(bias),
            **self.at("d", dy),
            **self.at("r", residual),
            **self.activation,
        }
        self.sums = {
            "sum_g": self.sum_g,
            "sum_g_xhat": self.sum_g_xhat,
            "dweight": self.dweight,
            "dbias": self.dbias,
        }

    def reduce(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Return sum g and sum g * xhat."""
        self.reduced = True
        self.launch(
            _programs()[0].reduce_grad, cut, True,
            **self.parts(cut, 2), **self.common, **self.sums,
        )  # fmt: skip
        return self.sum_g, self.sum_g_xhat

    def apply(
        self, cut: Cut, sums: tuple[Tensor, Tensor] | None, count: Tensor | int
    ) -> None:
        """Write dx and dresidual."""
        sum_g, sum_g_xhat = (None, None) if sums is None else sums
        self.launch(
            _programs()[0].apply_grad, cut, sum_g=sum_g, sum_g_xhat=sum_g_xhat,
            CORRECTION=self.form.correction, **_counted(count), **self.common, **self.gradients,
        )  # fmt: skip

    def whole(self, cut: Cut, count: Tensor | int) -> None:
        """Write all gradients."""
        if not cut.held:
            self.apply(cut, self.reduce(cut), count)
            return
        self.reduced = True
        self.launch(
            _programs()[1].backward, cut, True, CORRECTION=self.form.correction,
            **self.parts(cut, 2), **_counted(count), **self.common, **self.sums, **self.gradients,
        )  # fmt: skip

    def channels(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, as far as they were computed."""
        if self.batch.groups == 1:
            return self.dweight, self.dbias
        return (self.sum_g_xhat.sum(0), self.sum_g.sum(0)) if self.reduced else (None, None)


def _counts(count: Tensor | float, like: Tensor) -> Tensor | int:
    """Return a count as programs take it: whole, or a number of each group in float64."""
    if isinstance(count, Tensor):
        groups = like.shape[0] if like.ndim > 1 else 1
        return count.to(_WIDE).reshape(-1).expand(groups).contiguous()
    if float(count).is_integer():
        return int(count)
    return torch.full((1,), count, dtype=_WIDE, device=like.device)


def _counted(count: Tensor | int) -> dict[str, Any]:
    whole = isinstance(count, int)
    return {"counts": None if whole else count, "count": count if whole else 0}


def _target(
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return where to write y, and the others apart from it in memory."""
    if out is None or not is_same_view(x, out):
        return torch.empty_like(x), weight, bias, residual, mask
    return x, *apart(x, weight, bias, residual, mask)


def _steps(tensor: Tensor, batch: Batch) -> tuple[int, int]:
    found = steps_in(tuple(tensor.shape), tensor.stride(), batch.view)
    assert found is not None  # `fitting` saw to it
    return found if batch.view.planar else (found[0], 0)


def _wide(values: Tensor) -> Tensor:
    return values.to(_WIDE).contiguous()


def _plain(values: Tensor | None) -> Tensor | None:
    """Return numbers of the channels as programs read them."""
    if values is None:
        return None
    values = values.resolve_neg()
    return (values if values.dtype in TYPES else values.to(_WIDE)).contiguous()
