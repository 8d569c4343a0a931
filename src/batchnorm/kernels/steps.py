"""The layer made of the four steps, and what may stand between them.

own = collect(x)            total = pool.moments(own)          other processes
                            mean, inverse_std = correction     towards the running statistics
y = normalize(x)

own = reduce_grad(dy, x)    total = pool.sums(own)             the same processes
dx = apply_grad(dy, x)
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from batchnorm.kernels.contract import Form, Found, Given, Gradients, Needs, Steps
from batchnorm.moments import Moments, divide


class Pool(Protocol):
    """What else is normalized together with a batch, by the same moments."""

    def moments(self, own: Moments) -> Moments:
        """Return the moments of all, given those of the batch."""

    def sums(self, sum_g: Tensor, sum_g_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two sums of the backward pass over all, given those over the batch."""


class Correction(NamedTuple):
    """What batch renormalization makes of xhat: r * xhat + d, where r and d are constants.

    Attributes:
        r: (C,), or (G, C) of groups.
        d: Likewise.
    """

    r: Tensor
    d: Tensor

    def corrected(self, mean: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
        """Return by what `normalize` gives r * xhat + d."""
        scaled = inverse_std * self.r
        return mean - divide(self.d, scaled), scaled

    def of_xhat(self, sum_g: Tensor, sum_g_corrected: Tensor) -> Tensor:
        """Return sum g * xhat from sum g * (r * xhat + d)."""
        return (sum_g_corrected - self.d * sum_g) / self.r

    def through(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return a + b * xhat as the two coefficients of 1 and of r * xhat + d."""
        slope = b / self.r
        return a - self.d * slope, slope


class Corrects(Protocol):
    """What corrects the moments of a batch."""

    def correction(self, mean: Tensor, inverse_std: Tensor) -> Correction:
        """Return the correction; no gradient flows through it."""


def statistics(
    moments: Moments, form: Form, correction: Correction | None
) -> tuple[Tensor, Tensor]:
    """Return by what moments normalize: mean and inverse_std."""
    mean, inverse_std = moments.mean, moments.inverse_std(form.eps, form.correction)
    return (mean, inverse_std) if correction is None else correction.corrected(mean, inverse_std)


def forward(
    steps: Steps,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    out: Tensor | None = None,
    pool: Pool | None = None,
    corrects: Corrects | None = None,
) -> tuple[Found, Correction | None]:
    """Return what `Backend.forward` does for a batch's own moments, and their correction.

    Args:
        steps: The four.
        x: The batch.
        weight: gamma, (C,), or None.
        bias: beta, (C,), or None.
        residual: Added before the activation, or None.
        mask: The weights of the positions, or None.
        form: What does not change from call to call.
        out: Where y goes, or None.
        pool: What else the moments are those of.
        corrects: What corrects them.
    """
    moments = steps.collect(x, mask, form)
    if pool is not None:
        moments = pool.moments(moments)
    correction = None
    if corrects is not None:
        correction = corrects.correction(*statistics(moments, form, None))
    mean, inverse_std = statistics(moments, form, correction)
    given = Given(x, mean, inverse_std, weight, bias, residual, mask, form)
    return Found(steps.normalize(given, out), moments, mean, inverse_std), correction


def backward(
    steps: Steps,
    dy: Tensor,
    given: Given,
    count: Tensor | float | None,
    needs: Needs,
    pool: Pool | None = None,
    correction: Correction | None = None,
) -> Gradients:
    """Return what `Backend.backward` does, after a `forward` with that pool and correction."""
    dweight = dbias = dx = dresidual = through = None
    if needs.weight or needs.bias or (needs.x and count is not None):
        dbias, dweight = steps.reduce_grad(dy, given)
        if count is not None and needs.x:
            sums = (dbias, dweight) if pool is None else pool.sums(dbias, dweight)
            sum_g_xhat = sums[1] if correction is None else correction.of_xhat(*sums)
            through = divide(sums[0], count), divide(sum_g_xhat, count - given.form.correction)
            if correction is not None:
                through = correction.through(*through)
        if dbias.ndim > 1:  # of groups
            dbias, dweight = dbias.sum(0), dweight.sum(0)
    if needs.x or needs.residual:
        dx, dresidual = steps.apply_grad(dy, given, through)
    return Gradients(dx, dweight, dbias, dresidual)
