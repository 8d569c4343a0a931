"""The four steps in PyTorch operations.

They run on any device and are differentiable themselves, any number of times, in forward mode and
under `vmap` too: what the other backends fall back to, and what `torch.compile` fuses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import steps
from batchnorm.kernels.contract import Form, Found, Given, Gradients, Needs
from batchnorm.moments import Moments, present, statistics_dtype
from batchnorm.positions import over_channels, sum_positions


class Eager:
    """The backend that is always there.

    Args:
        in_place: Whether temporary tensors may be overwritten: faster, but then the steps
            themselves are not differentiable.
    """

    name = "eager"

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place

    def available(self) -> str | None:
        """Return None: it needs nothing but torch."""
        return None

    def supports(self, x: Tensor, form: Form) -> str | None:
        """Return None: it takes whatever the layer takes."""
        return None

    def collect(self, x: Tensor, mask: Tensor | None, form: Form) -> Moments:
        """Return the moments of every channel."""
        return Moments.of(x, channel_dim=form.channel_dim, weights=mask, ghost_size=form.ghost_size)

    def normalize(self, given: Given, out: Tensor | None = None) -> Tensor:
        """Return y."""
        ready = _prepare(given)
        y = _preactivation(ready, given, self._over(ready.distance))
        if given.form.activation is not None:
            y = given.form.activation(y)
        return y.to(given.x.dtype) if out is None else out.copy_(y)

    def reduce_grad(self, dy: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return the gradients of bias and weight."""
        ready = _prepare(given)
        g = _upstream(dy, ready, given)
        sum_g = _sums(g, given)
        product = torch.mul(g, ready.distance, out=self._over(ready.distance))
        sum_distance = _sums(product, given)
        return sum_g, (sum_distance - ready.mean_rest * sum_g) * given.inverse_std

    def apply_grad(
        self, dy: Tensor, given: Given, through: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return dx and dresidual."""
        ready, form = _prepare(given), given.form
        g = _upstream(dy, ready, given)
        dx = g * _over_channels(ready.scale, g, form)
        if through is not None:
            # scale * (through[0] + xhat * through[1]), as offset + slope * distance
            slope = ready.scale * through[1] * given.inverse_std
            offset = ready.scale * through[0] - slope * ready.mean_rest
            back = torch.addcmul(
                _over_channels(offset, g, form),
                ready.distance,
                _over_channels(slope, g, form),
                out=self._over(ready.distance),
            )
            if given.mask is not None:
                back = torch.where(given.mask == 0, 0, back * given.mask)
            dx = torch.sub(dx, back, out=self._over(dx))
        if given.mask is not None:
            dx = torch.where((given.mask == 0) & ~given.x.isfinite(), 0, dx)
        return dx.to(given.x.dtype), g

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
        if running is None:
            return steps.forward(self, x, weight, bias, residual, mask, form, out)[0]
        kept = statistics_dtype(x.device)
        mean = running[0].detach().to(kept, copy=True)
        inverse_std = (running[1].detach().to(kept) + form.eps).rsqrt()
        given = Given(x, mean, inverse_std, weight, bias, residual, mask, form)
        return Found(self.normalize(given, out), None, mean, inverse_std)

    def backward(
        self, dy: Tensor, given: Given, count: Tensor | float | None, needs: Needs
    ) -> Gradients:
        """Return the gradients."""
        return steps.backward(self, dy, given, count, needs)

    def _over(self, temporary: Tensor) -> Tensor | None:
        """Return where a result may go: over a temporary of its size, or None for a new tensor."""
        return temporary if self.in_place else None


class _Ready(NamedTuple):
    """What each step computes anew, in the precision of the arithmetic: float32 at least."""

    distance: Tensor  # x - mean, but for mean_rest
    mean_rest: Tensor  # what the mean has beyond that precision, (C,): the mean is two floats
    scale: Tensor  # weight * inverse_std, (C,), in the precision of the statistics


def _prepare(given: Given) -> _Ready:
    x = given.x.to(torch.promote_types(given.x.dtype, torch.float32))
    if given.mask is not None:
        x = present(x, given.mask)
    near = given.mean.to(x.dtype)  # (C,), or (G, C), as all that follow
    scale = given.inverse_std if given.weight is None else given.inverse_std * given.weight
    return _Ready(x - _over_channels(near, x, given.form), given.mean - near, scale)


def _preactivation(ready: _Ready, given: Given, out: Tensor | None = None) -> Tensor:
    """Return z, the input of the activation."""
    shift = ready.mean_rest * -ready.scale
    if given.bias is not None:
        shift = shift + given.bias
    distance, form = ready.distance, given.form
    z = torch.addcmul(
        _over_channels(shift, distance, form),
        distance,
        _over_channels(ready.scale, distance, form),
        out=out,
    )
    return z if given.residual is None else z + given.residual.to(z.dtype)


def _upstream(dy: Tensor, ready: _Ready, given: Given) -> Tensor:
    """Return g, the gradient by the input of the activation."""
    g = dy.to(ready.distance.dtype)
    if given.form.activation is None:
        return g
    return given.form.activation.backward(g, _preactivation(ready, given))


def _over_channels(values: Tensor, x: Tensor, form: Form) -> Tensor:
    """Return a number a channel in the precision of `x` and ready to broadcast over it."""
    groups = form.groups(x.shape) if values.ndim > 1 else None
    return over_channels(values.to(x.dtype), x.ndim, form.channel_dim, groups)


def _sums(values: Tensor, given: Given) -> Tensor:
    """Return the sums over the positions in the shape and the precision of the statistics."""
    groups = given.form.groups(values.shape) if given.mean.ndim > 1 else None
    return sum_positions(values, given.form.channel_dim, groups).to(given.mean.dtype)
