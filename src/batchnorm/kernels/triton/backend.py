"""The four steps in Triton, for tensors on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.contract import Form, Found, Given, Gradients, Needs
from batchnorm.kernels.layouts import in_order
from batchnorm.kernels.memory import apart, apart_from, is_same_view, written
from batchnorm.kernels.triton.device import TYPES, is_interpreted, missing, refusal
from batchnorm.kernels.triton.launches import (
    Backward,
    Forward,
    counts_of,
    cut_of,
    seen,
    wide,
)
from batchnorm.kernels.triton.plan import batch_of
from batchnorm.moments import Moments


class Triton:
    """The backend in Triton, for float64, float32, bfloat16 and float16 on NVIDIA and AMD GPUs."""

    name = "triton"

    def available(self) -> str | None:
        """Return why no program can run here, or None if one can."""
        return missing()

    def supports(self, x: Tensor, form: Form) -> str | None:
        """Return why it cannot take this batch, or None if it can."""
        place = "cpu" if is_interpreted() and x.device.type == "cpu" else "cuda"
        if x.device.type != place:
            return f"it takes tensors on a GPU, not on {x.device.type}"
        if x.layout is not torch.strided:
            return f"it takes dense tensors, not {x.layout}"
        if place == "cuda" and (reason := refusal(x.device.index)) is not None:
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
        batch = seen(x, form)
        weights = None if mask is None else in_order(mask, x, batch.view)
        return Forward(x, batch, None, weights, None, None, None, form).collect(cut_of(batch, x))[0]

    def normalize(self, given: Given, out: Tensor | None = None) -> Tensor:
        """Return y."""
        x, mean, inverse_std, weight, bias, residual, mask, form = given
        batch = seen(x, form, mean.ndim > 1)
        y, weight, bias, residual, mask = _target(x, out, weight, bias, residual, mask)
        weights = None if mask is None else in_order(mask, x, batch.view)
        call = Forward(x, batch, y, weights, weight, bias, residual, form)
        call.normalize(cut_of(batch, x), wide(mean), wide(inverse_std))
        return written(y, out)

    def reduce_grad(self, dy: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return the gradients of bias and weight."""
        call = Backward(dy, given, Needs(False, False, False, False))
        return call.reduce(cut_of(call.batch, given.x))

    def apply_grad(
        self, dy: Tensor, given: Given, through: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return dx and dresidual."""
        # what is given was divided by the counts already
        given = given._replace(form=given.form._replace(correction=0))
        call = Backward(dy, given, Needs(True, False, False, True))
        sums = None if through is None else (wide(through[0]), wide(through[1]))
        call.apply(cut_of(call.batch, given.x), sums, 1)
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
        batch = seen(x, form, running is None)
        y, weight, bias, residual, mask = _target(x, out, weight, bias, residual, mask)
        weights = None if mask is None else in_order(mask, x, batch.view)
        call = Forward(x, batch, y, weights, weight, bias, residual, form)
        if running is not None:
            if y is x:  # programs write to it while others still read these
                running = apart_from(x, running[0]), apart_from(x, running[1])
            mean, inverse_std = call.normalize_by(cut_of(batch, x), *running)
            return Found(written(y, out), None, mean, inverse_std)
        again = None if is_same_view(x, y) else call.whole
        cut = cut_of(batch, x, call.work("forward", residual), again)
        moments, mean, inverse_std = call.whole(cut)
        return Found(written(y, out), moments, mean, inverse_std)

    def backward(
        self, dy: Tensor, given: Given, count: Tensor | float | None, needs: Needs
    ) -> Gradients:
        """Return the gradients."""
        call = Backward(dy, given, needs)
        x = given.x
        if count is None or not needs.x:  # nothing flows back through the moments
            cut = cut_of(call.batch, x)
            if needs.weight or needs.bias:
                call.reduce(cut)
            if call.dx is not None or call.dresidual is not None:
                call.apply(cut, None, 1)
        else:
            known = counts_of(count, given.mean)
            work = call.work("backward", given.residual)
            cut = cut_of(call.batch, x, work, lambda cut: call.whole(cut, known))
            call.whole(cut, known)
        dresidual = dy if call.dresidual is None and needs.residual else call.dresidual
        return Gradients(call.dx, *call.channels(), dresidual)


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
