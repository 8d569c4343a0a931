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
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.moments import divide, statistics_dtype

#: How many replicates there are: their mean and variance are used, not their extremes.
REPLICATES = 200


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
        step: Of how many channels one is looked at.
        mean: What the layer has kept.
        std: What the layer divides by: sqrt(running_var + eps).
    """

    def __init__(
        self, mean: Tensor, var: Tensor, eps: float, behind: float = math.inf, step: int = 1
    ) -> None:
        self.count, self.step, self._behind = 0, step, behind
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
        ratio = (var + self._eps).clamp(min=torch.finfo(var.dtype).tiny)
        distance = ((1 + shift.square()) / ratio + ratio + shift.square()) / 2 - 1
        # What chance makes of it is that of examples like these which had the moments of the layer:
        # a variance is a^2 about the mean of the data, and both are in the units of the data.
        drawn = (self._drawn - self._weights * means.flatten().float()).view(-1, *means.shape)
        drawn *= math.sqrt(noisier / (n * (n - 1)))
        drawn_var = (drawn[:, 1] - 2 * shift * drawn[:, 0]) / ratio
        covariance = crossed[0] - means[0] * means[1]
        spread_var = spread[1] - 4 * shift * covariance + 4 * shift.square() * spread[0]
        chance = spread[0] / ratio + spread_var.clamp(min=0) / ratio.square() / 2
        third = cubes - 3 * means * squares + 2 * means.pow(3)
        return Compared(
            count=n,
            step=self.step,
            mean=shift,
            ratio=ratio,
            distance=distance,
            noise=chance / (n - 1) * noisier,
            by_chance=drawn[:, 0].square() / ratio + drawn_var.square() / 2,
            t=torch.stack([shift, means[1] + self._eps - 1]) / noise.sqrt(),
            skew=third / spread.pow(1.5),
        )


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
        by_chance: The distances of the replicates, (REPLICATES, C).
        t: How many standard errors the means of a and a^2 have moved, (2, C).
        skew: The skewness of both over the examples, (2, C).
    """

    count: int
    step: int
    mean: Tensor
    ratio: Tensor
    distance: Tensor
    noise: Tensor
    by_chance: Tensor
    t: Tensor
    skew: Tensor

    def p_values(self) -> Tensor:
        """Return, for each channel, how probable what was seen would be by chance.

        Of mean and variance the one that moved more, by the t distribution, doubled. Squares are
        skewed, and few of them have no t distribution: Hall's transformation mends that.

        Source:
            Hall, On the removal of skewness by transformation, 1992. Wallace, Bounds on normal
            approximations to Student's and the chi-square distributions, 1959.
        """
        t, skew, freedom = self.t.nan_to_num(0, 1e6, -1e6), self.skew.nan_to_num(0), self.count - 1
        s = skew / math.sqrt(self.count)
        t = t + s * t.square() / 3 + s.square() * t.pow(3) / 27 + s / 6
        z = (freedom * torch.log1p(t.square() / freedom)).sqrt()
        z = z * (8 * freedom + 1) / (8 * freedom + 3)
        p: Tensor = 2 * torch.special.erfc(z.amax(0) / math.sqrt(2))
        return p.clamp(max=1)


def excess(distance: Tensor, by_chance: Tensor, count: int) -> float:
    """Return how far a mean distance is above what it is by chance, as a standard normal number.

    Both are sums of squares, about gamma distributed: the distance, and what chance makes of it as
    far as so many examples tell. Their ratio has an F distribution, whose cube root is about
    normal.

    Args:
        distance: What was seen, one number.
        by_chance: The same of the replicates.
        count: The number of examples.

    Source:
        Paulson, An approximate normalization of the analysis of variance distribution, 1942.
    """
    mean, var = float(by_chance.mean()), float(by_chance.var())
    if not var > 0:  # all examples are the same
        return math.inf if float(distance) > mean else 0.0
    part = var / (9 * mean * mean)  # 2 / 9 of one over the degrees of freedom
    rest = part / (count - 1)
    root = math.cbrt(min(float(distance) / mean, 1e30))
    return ((1 - rest) * root - (1 - part)) / math.sqrt(rest * root * root + part)


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
