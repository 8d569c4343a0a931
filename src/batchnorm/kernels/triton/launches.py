"""The launches of a call: what is written, what the programs are given, how the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.contract import Form, Given, Needs
from batchnorm.kernels.layouts import fitting, in_order, steps_in
from batchnorm.kernels.triton import tuning
from batchnorm.kernels.triton.device import TYPES, programs, start
from batchnorm.kernels.triton.plan import (
    HELD,
    Batch,
    Cut,
    alignment,
    batch_of,
    candidates,
    fits,
    is_far,
    multiprocessors,
    piece_of,
    reckoned,
)
from batchnorm.moments import Moments

#: What statistics and sums are kept in.
WIDE = torch.float64
_GRADIENTS = (torch.float32, WIDE)


def seen(x: Tensor, form: Form, grouped: bool = True) -> Batch:
    """Return what is needed of a batch that `supports` let pass.

    Args:
        x: The batch.
        form: Of the call.
        grouped: Whether the numbers that normalize it are those of its groups, where it has some.
    """
    size = form.ghost_size if grouped else None
    found = batch_of(tuple(x.shape), x.stride(), form.channel_dim, size)
    if found is None:
        raise ValueError("a batch that triton does not support")
    return found


def cut_of(
    batch: Batch, x: Tensor, work: str = "", run: Callable[[Cut], object] | None = None
) -> Cut:
    """Return how a batch is cut: as it was tuned, or as is reckoned.

    Args:
        batch: What is cut.
        x: The tensor.
        work: What is done, all of forward or backward; or nothing, for one step of the four.
        run: Does the work by a cut, to be timed; None if that cannot be done more than once.
    """
    held = HELD if work else 0
    sms = multiprocessors(x.device)
    own = reckoned(batch, x.element_size(), sms, held)
    if not work or not (tuning.table(x.device) or tuning.is_asked_for()):
        return own
    view = batch.view
    key = (
        f"{work}, {'planar' if view.planar else 'interleaved'} {view.N}x{view.C}x{view.S}, "
        f"groups {batch.groups}, {str(x.dtype).removeprefix('torch.')}"
    )
    found = tuning.kept(key, x.device)
    if found is not None and fits(found, batch, sms):
        return found
    if run is None or not tuning.is_asked_for():
        return own
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return own
    return tuning.fastest(
        key, x.device, [own, *candidates(batch, x.element_size(), sms, held)], run
    )


class Launcher:
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
        self.activation: dict[str, Any] = {"ACTIVATION": name, "PARAMETER": parameter or 0.0}
        self.sizes: dict[str, Any] = {
            "rows": view.N,
            "group": batch.group,
            "groups": batch.groups,
            "channels": view.C,
            "width": batch.width // self.align,
        }

    def work(self, direction: str, residual: Tensor | None) -> str:
        """Return what is done to the batch, in words: what its cut may depend on."""
        steps = [direction, self.activation["ACTIVATION"], residual is not None and "residual"]
        return " + ".join(step for step in [*steps, self.weights is not None and "mask"] if step)

    def at(self, prefix: str, tensor: Tensor | None) -> dict[str, int]:
        """Return the two steps of a tensor under the names that programs have for them."""
        row, unit = (0, 0) if tensor is None else self.steps[id(tensor)]
        return {f"{prefix}_row": row // self.align, f"{prefix}_unit": unit // self.align}

    def new(self, *shape: int, dtype: torch.dtype = WIDE) -> Tensor:
        """Return an uninitialized tensor beside x."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def numbers(self, how_many: int) -> list[Tensor]:
        """Return uninitialized tensors of a number a channel, (C,), or (G, C) of groups."""
        return [self.new(*self.batch.statistics) for _ in range(how_many)]

    def parts(self, cut: Cut, planes: int) -> dict[str, Any]:
        """Return where programs leave their parts, and count who was there."""
        view, groups = self.batch.view, self.batch.groups
        piece = piece_of(cut.columns, view.planar, cut.programs)
        if cut.held and cut.programs == 1:
            return {"parts": None, "arrived": None, "PIECE": piece}
        accumulated = torch.promote_types(self.x.dtype, torch.float32)
        items = self.batch.units(cut.columns) * groups
        return {
            "parts": self.new(planes * groups * cut.programs * view.C, dtype=accumulated),
            "arrived": torch.zeros(items, dtype=torch.int32, device=self.x.device),
            "PIECE": piece,
        }

    def launch(self, program: Any, cut: Cut, **arguments: Any) -> None:
        """Run a program on the batch."""
        from triton import language

        batch, constants = self.batch, dict[str, Any]()
        items = batch.units(cut.columns) * batch.groups
        number = items * cut.programs
        if not number:  # there are no channels
            return
        if not cut.held:
            constants["splits"] = cut.programs
        else:
            constants["PROGRAMS"] = cut.programs
            if cut.programs > 1:  # they wait for one another: all have to run at once
                room = multiprocessors(self.x.device) // cut.programs
                number = min(items, max(room, 1)) * cut.programs
                if self.x.is_cuda:
                    constants["launch_cooperative_grid"] = True
        start(
            program, number, self.x, x=self.x, weights=self.weights,
            **self.at("x", self.x), **self.sizes, **arguments, **constants,
            PLANAR=batch.view.planar, FAR=self.far, ALIGN=self.align,
            ACC=language.float64 if self.x.dtype == WIDE else language.float32,
            ROWS=cut.rows, COLUMNS=cut.columns, num_warps=cut.warps,
        )  # fmt: skip


class Forward(Launcher):
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
        self.results: dict[str, Any] = {
            "y": y,
            "residual": residual,
            **self.at("y", y),
            **self.at("r", residual),
        }
        self.affine: dict[str, Any] = {"weight": plain(weight), "bias": plain(bias)}

    def collect(self, cut: Cut) -> tuple[Moments, Tensor, Tensor]:
        """Return the batch's moments, and by what mean and inverse_std they normalize."""
        mean, inverse_std, m2 = self.numbers(3)
        counts, count = self._count()
        self.launch(
            programs()[0].collect, cut, mean=mean, inverse_std=inverse_std, m2=m2,
            counts=counts, EPS=float(self.form.eps), CORRECTION=float(self.form.correction),
            **self.parts(cut, 4),
        )  # fmt: skip
        return Moments(count, mean, m2), mean, inverse_std

    def normalize(self, cut: Cut, mean: Tensor, inverse_std: Tensor) -> None:
        """Write y, by given numbers."""
        self.launch(
            programs()[0].normalize, cut, mean=mean, inverse_std=inverse_std, running_var=None,
            kept_mean=None, kept_inverse_std=None, EPS=float(self.form.eps),
            **self.results, **self.affine, **self.activation,
        )  # fmt: skip

    def normalize_by(self, cut: Cut, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Write y, by running statistics; return copies of what was used."""
        kept, inverse_std = (self.new(self.batch.view.C) for _ in range(2))
        self.launch(
            programs()[0].normalize, cut, mean=plain(mean), inverse_std=None,
            running_var=plain(var), kept_mean=kept, kept_inverse_std=inverse_std,
            EPS=float(self.form.eps), **self.results, **self.affine, **self.activation,
        )  # fmt: skip
        return kept, inverse_std

    def whole(self, cut: Cut) -> tuple[Moments, Tensor, Tensor]:
        """Write y; return what `collect` does."""
        if not cut.held:
            moments, mean, inverse_std = self.collect(cut)
            self.normalize(cut, mean, inverse_std)
            return moments, mean, inverse_std
        mean, inverse_std, m2 = self.numbers(3)
        counts, count = self._count()
        self.launch(
            programs()[1].forward, cut, mean=mean, inverse_std=inverse_std, m2=m2,
            counts=counts, EPS=float(self.form.eps), CORRECTION=float(self.form.correction),
            **self.parts(cut, 4), **self.results, **self.affine, **self.activation,
        )  # fmt: skip
        return Moments(count, mean, m2), mean, inverse_std

    def _count(self) -> tuple[Tensor | None, Tensor | float]:
        """Return where counts are to be written, if they are, and the count of the moments."""
        view = self.batch.view
        if len(self.batch.statistics) > 1:
            counts = self.new(self.batch.groups, 1)
            return counts, counts
        if self.weights is None:
            return None, view.N * view.S
        counts = self.new(1)
        return counts, counts[0]


class Backward(Launcher):
    """The launches of a backward pass."""

    def __init__(self, dy: Tensor, given: Given, needs: Needs) -> None:
        x, mean, inverse_std, weight, bias, residual, mask, form = given
        batch = seen(x, form, mean.ndim > 1)
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
        kind = WIDE if weight is None or weight.dtype not in _GRADIENTS else weight.dtype
        one = batch.groups == 1
        self.dweight = self.new(batch.view.C, dtype=kind) if one and needs.weight else None
        self.dbias = self.new(batch.view.C, dtype=kind) if one and needs.bias else None
        self.sums: list[Tensor] = []  # of g, and of g * xhat
        self.gradients: dict[str, Any] = {
            "dx": self.dx,
            "dresidual": self.dresidual,
            **self.at("dx", like),
        }
        self.common: dict[str, Any] = {
            "dy": dy,
            "residual": residual,
            "mean": wide(mean),
            "inverse_std": wide(inverse_std),
            "weight": plain(weight),
            "bias": plain(bias),
            **self.at("d", dy),
            **self.at("r", residual),
            **self.activation,
        }

    def reduce(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Return sum g and sum g * xhat."""
        self.launch(
            programs()[0].reduce_grad, cut,
            **self.parts(cut, 2), **self.common, **self._new_sums(),
        )  # fmt: skip
        sum_g, sum_g_xhat = self.sums
        return sum_g, sum_g_xhat

    def _new_sums(self) -> dict[str, Any]:
        """Return where the sums go, and the gradients that they are."""
        self.sums = self.numbers(2)
        names = dict(zip(("sum_g", "sum_g_xhat"), self.sums, strict=True))
        return {**names, "dweight": self.dweight, "dbias": self.dbias}

    def apply(self, cut: Cut, sums: tuple[Tensor, Tensor] | None, count: Tensor | int) -> None:
        """Write dx and dresidual."""
        sum_g, sum_g_xhat = (None, None) if sums is None else sums
        self.launch(
            programs()[0].apply_grad, cut, sum_g=sum_g, sum_g_xhat=sum_g_xhat,
            CORRECTION=float(self.form.correction), **counted(count),
            **self.common, **self.gradients,
        )  # fmt: skip

    def whole(self, cut: Cut, count: Tensor | int) -> None:
        """Write all gradients."""
        if not cut.held:
            self.apply(cut, self.reduce(cut), count)
            return
        self.launch(
            programs()[1].backward, cut, CORRECTION=float(self.form.correction),
            **self.parts(cut, 2), **counted(count), **self.common, **self._new_sums(),
            **self.gradients,
        )  # fmt: skip

    def channels(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, as far as they were computed."""
        if self.batch.groups == 1 or not self.sums:
            return self.dweight, self.dbias
        return self.sums[1].sum(0), self.sums[0].sum(0)


def counts_of(count: Tensor | float, like: Tensor) -> Tensor | int:
    """Return a count as programs take it: whole, or a number of each group in float64."""
    if isinstance(count, Tensor):
        groups = like.shape[0] if like.ndim > 1 else 1
        return count.to(WIDE).reshape(-1).expand(groups).contiguous()
    if float(count).is_integer():
        return int(count)
    return torch.full((1,), count, dtype=WIDE, device=like.device)


def counted(count: Tensor | int) -> dict[str, Any]:
    """Return a count under the names that programs have for it."""
    whole = isinstance(count, int)
    return {"counts": None if whole else count, "count": count if whole else 0}


def _steps(tensor: Tensor, batch: Batch) -> tuple[int, int]:
    found = steps_in(tuple(tensor.shape), tensor.stride(), batch.view)
    assert found is not None  # `fitting` saw to it
    return found if batch.view.planar else (found[0], 0)


def wide(values: Tensor) -> Tensor:
    """Return statistics as programs read them."""
    return values.to(WIDE).contiguous()


def plain(values: Tensor | None) -> Tensor | None:
    """Return numbers of the channels as programs read them."""
    if values is None:
        return None
    values = values.resolve_neg()
    return (values if values.dtype in TYPES else values.to(WIDE)).contiguous()
