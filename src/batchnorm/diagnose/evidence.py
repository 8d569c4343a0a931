"""What data say of the moments of one layer, beside those that it has kept.

In the layer's own units, a = (x - running_mean) / sqrt(running_var + eps), each example i gives two
numbers a channel, the means over its positions of a and of a^2. Positions of one example are alike
and examples are not, so it is examples that are counted, and all that is kept are sums over them.

What the sums would be by chance is found by drawing: each replicate weighs the examples by standard
normal numbers, the same ones for all channels of all layers, so that what the channels have in
common is in the replicates, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.moments import divide, statistics_dtype

#: How many replicates there are: their mean and variance are used, not their extremes.
REPLICATES = 200
_ROUNDING = 1e-6  # of a distance
_CONSTANT = 1e-9  # of a mean square: the sums of the replicates are in float32


class Evidence:
    """The sums of one layer, over any number of examples.

    Args:
        mean: What the layer has kept, (C,).
        var: Likewise.
        eps: Of the layer.
        behind: How many examples stand behind what the layer has kept.
        step: Of how many channels one is looked at.

    Attributes:
        count: The number of examples.
        not_finite: The number of those that were left out.
        step: Of how many channels one is looked at.
        mean: What the layer has kept.
        std: What the layer divides by: sqrt(running_var + eps).
    """

    def __init__(
        self, mean: Tensor, var: Tensor, eps: float, behind: float = math.inf, step: int = 1
    ) -> None:
        self.count, self.not_finite, self.step, self._behind = 0, 0, step, behind
        mean, var = mean[::step], var[::step]
        dtype = statistics_dtype(mean.device)
        self.mean = mean.detach().to(dtype, copy=True)
        self.std = (var.detach().to(dtype) + eps).sqrt()
        self._eps = eps / self.std.square()
        self._powers = torch.zeros((4, 2, len(mean)), dtype=dtype, device=mean.device)
        self._drawn = torch.zeros((REPLICATES, 2 * len(mean)), device=mean.device)
        self._weights = torch.zeros((REPLICATES, 1), device=mean.device)

    def add(self, x: Tensor, places: Tensor | None, weights: Tensor) -> None:
        """Add the examples of a call that have a position.

        Args:
            x: What the layer got, (examples, C, positions).
            places: The weights of the positions, (examples, 1, positions), or None.
            weights: Of each replicate, those of the examples, (REPLICATES, examples).
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, std = (v.to(wide)[:, None] for v in (self.mean, self.std))
        a = (x[:, :: self.step].to(wide) - mean) / std
        if places is None:
            self.add_each(torch.stack([a.mean(2), a.square().mean(2)], 1), weights)
            return
        a = torch.where(places > 0, a, 0)
        of_each = torch.stack([(a * places).sum(2), (a.square() * places).sum(2)], 1)
        there = places.sum((1, 2)) > 0
        of_each = divide(of_each, places.sum(2)[:, :, None])
        self.add_each(of_each[there], weights[:, there])

    def add_each(self, of_each: Tensor, weights: Tensor) -> None:
        """Add examples by their two numbers a channel, but for those that are not finite.

        Args:
            of_each: The means over the positions of a and of a^2, (examples, 2, C).
            weights: Of each replicate, those of the examples, (REPLICATES, examples).
        """
        finite = of_each.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            self.not_finite += int((~finite).sum())
            of_each, weights = of_each[finite], weights[:, finite]
        exact = of_each.to(self._powers.dtype)
        self.count += len(exact)
        square = exact * exact
        products = (exact, square, square * exact, exact * exact.flip(1))
        self._powers += torch.stack([each.sum(0) for each in products])
        self._drawn += weights @ of_each.flatten(1).float()
        self._weights += weights.sum(1, keepdim=True)

    def compare(self) -> Compared:
        """Return how far the moments of the data are from those that the layer has kept.

        Raises:
            ValueError: There are fewer than two examples, of which nothing is known to be chance.
        """
        n = self.count
        if n < 2:
            raise ValueError(f"it saw {n} finite examples: expected two or more")
        means, squares, cubes, crossed = self._powers / n
        shift = means[0]
        # one part of the noise is the data's, the other that of what they are compared with
        noisier = 1 + n / self._behind
        spread = (squares - means.square()).clamp(min=0)
        noise = spread / (n - 1) * noisier
        var = (means[1] - shift.square() + noise[0]).clamp(min=0)
        ratio = var + self._eps
        # one example more, as those of training: few may all be alike, and yet vary
        held = (n * ratio + 1) / (n + 1)
        distance = ((1 + shift.square()) / held + held + shift.square()) / 2 - 1
        # What chance makes of it is that of examples like these which had the moments of the layer:
        # a variance is a^2 about the mean of the data, and both are in the units of the data.
        covariance = crossed[0] - means[0] * means[1]
        of_var = spread[1] - 4 * shift * covariance + 4 * shift.square() * spread[0]
        of_var = of_var.clamp(min=0) / (n - 1) * noisier
        parts = torch.stack([noise[0] / var, of_var / var.square() / 2]).nan_to_num(0, 0)
        # what is constant but for rounding, as behind a ReLU that never opens, says nothing
        parts[spread <= _CONSTANT * means.square()] = 0
        drawn = (self._drawn - self._weights * means.flatten().float()).view(-1, *means.shape)
        drawn *= math.sqrt(noisier / (n * (n - 1)))
        third = cubes - 3 * means * squares + 2 * means.pow(3)
        z = _normal(
            torch.stack([shift, means[1] + self._eps - 1]) / noise.sqrt(),
            third / spread.pow(1.5),
            n,
        )
        # Of a channel that is seldom active, few examples show nothing, and of that they are sure.
        z[1].clamp_(min=-math.sqrt(n) / 2)
        return Compared(
            count=n,
            step=self.step,
            mean=shift,
            ratio=ratio,
            distance=distance,
            noise=parts.sum(0),
            z=z,
            tested=(parts * z.square()).sum(0),
            by_chance=(parts * (drawn.square() / noise).nan_to_num(0, 0)).sum(1),
        )


def _normal(t: Tensor, skew: Tensor, count: int) -> Tensor:
    """Return what is standard normal where t is a mean over its standard error, and nothing moved.

    Squares are skewed, and few of them have no t distribution: Hall's transformation mends that.

    Args:
        t: The means, in standard errors.
        skew: The skewness of what they are means of.
        count: Of how many.

    Source:
        Hall, On the removal of skewness by transformation, 1992. Wallace, Bounds on normal
        approximations to Student's and the chi-square distributions, 1959.
    """
    t, s, freedom = (
        t.nan_to_num(0, 1e6, -1e6),
        skew.nan_to_num(0, 0, 0) / math.sqrt(count),
        count - 1,
    )
    t = t + s * t.square() / 3 + s.square() * t.pow(3) / 27 + s / 6
    z = (freedom * torch.log1p(t.square() / freedom)).sqrt() * t.sign()
    return z * (8 * freedom + 1) / (8 * freedom + 3)


@dataclass(frozen=True)
class Compared:
    """How far the moments of data are from those that a layer has kept, by channel.

    Attributes:
        count: The number of examples.
        step: Of how many channels there is one here.
        mean: How far the mean has moved, in standard deviations of the layer.
        ratio: The variance, relative to that of the layer, both with eps.
        distance: The symmetric Kullback-Leibler divergence of the two normal distributions.
        noise: What the distance is by chance, where nothing has moved.
        z: How far the means of a and a^2 have moved, as standard normal numbers, (2, C).
        tested: The sum of their squares, each as large as its part in the noise.
        by_chance: The same of the replicates, (REPLICATES, C).
    """

    count: int
    step: int
    mean: Tensor
    ratio: Tensor
    distance: Tensor
    noise: Tensor
    z: Tensor
    tested: Tensor
    by_chance: Tensor

    def p_values(self) -> Tensor:
        """Return, for each channel, how probable what was seen would be by chance.

        Of mean and variance the one that moved more, doubled.
        """
        p: Tensor = 2 * torch.special.erfc(self.z.abs().amax(0) / math.sqrt(2))
        return p.clamp(max=1)


def excess(found: Sequence[Compared], tolerance: float = 0.0) -> float:
    """Return how far layers together are above chance, as a standard normal number.

    Each layer is in units of its own chance, or else the noisiest would drown the others. What was
    seen and what chance makes of it are sums of squares, about gamma distributed, and the cube root
    of such a number is about normal.

    Args:
        found: The layers.
        tolerance: A distance that counts for none.

    Source:
        Wilson & Hilferty, The distribution of chi-square, 1931.
    """
    seen, drawn = [], []
    for layer in found:
        by_chance = layer.by_chance.mean(1).cpu()
        unit = float(by_chance.mean())
        if unit > 0:
            seen.append((float(layer.tested.mean()) - tolerance) / unit)
            drawn.append(by_chance / unit)
        elif float(layer.distance.mean()) > max(tolerance, _ROUNDING):
            return math.inf  # all examples are the same, and not those of training
    if not drawn:
        return 0.0
    part = float(torch.stack(drawn).mean(0).var()) / 9
    return (math.cbrt(math.fsum(seen) / len(seen)) - 1 + part) / math.sqrt(part)


def p_value(z: float) -> float:
    """Return how probable it is that a standard normal number is larger."""
    return math.erfc(z / math.sqrt(2)) / 2


def corrected(p: list[float]) -> list[float]:
    """Return p-values that can be held against one level however many there are (Holm, 1979)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    result, largest = [1.0] * len(p), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, p[at] * (len(p) - rank)))
        result[at] = largest
    return result


def discovered(p: Tensor, rate: float) -> Tensor:
    """Return which are no chance, of which about that rate are (Benjamini & Hochberg, 1995).

    Args:
        p: p-values, of any number.
        rate: How many of those that are returned may be chance after all.
    """
    ordered, _ = p.sort()
    ranks = torch.arange(1, len(p) + 1, device=p.device)
    below = (ordered <= rate * ranks / len(p)).nonzero()
    return p <= ordered[below[-1, 0]] if len(below) else torch.zeros_like(p, dtype=torch.bool)
