"""How examples are spread within batches and between them: what batches are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.moments import Moments


class Spread:
    """The moments of one value a channel for each example, within batches and over all.

    Attributes:
        batches: The number of batches.
        largest: The number of examples in the largest one.
    """

    def __init__(self) -> None:
        self._all: Moments | None = None
        self._within: Tensor | None = None
        self.batches = self.largest = 0

    def add(self, values: Tensor) -> None:
        """Add a batch.

        Args:
            values: The examples' values, (N, C).
        """
        found = Moments.of(values)
        self._all = found if self._all is None else self._all + found
        self._within = found.m2 if self._within is None else self._within + found.m2
        self.batches += 1
        self.largest = max(self.largest, len(values))

    @property
    def examples(self) -> int:
        """Return the number of examples."""
        return 0 if self._all is None else int(self._all.count)

    def variance(self) -> Tensor:
        """Return the variance of the examples, (C,): within batches, if these have several."""
        assert self._all is not None  # or there is nothing to ask about
        assert self._within is not None
        freedom = self.examples - self.batches
        return self._within / freedom if freedom > 0 else self._all.var(correction=1)

    def excess(self) -> tuple[float, float]:
        """Return how much more the means of batches vary than those of shuffled ones would.

        F = variance of the batches' means / (variance of the examples within batches / n)

        Returns:
            F, as the mean over the channels; and how unlikely it is, in standard deviations of a
            normal variable (Paulson's approximation).
        """
        between, within = self.batches - 1, self.examples - self.batches
        if between < 1 or within < _FREEDOM:
            return 1.0, 0.0
        assert self._all is not None
        assert self._within is not None
        total, live = self._all.m2, self._all.m2 > 0
        if not bool(live.any()):
            return 1.0, 0.0
        chance = self._within.clamp(min=_LEAST * total) / within
        f = float(((total - self._within).clamp(min=0) / between / chance)[live].mean())
        a, b = 2 / (9 * between), 2 / (9 * within)
        root = f ** (1 / 3)
        return f, ((1 - b) * root - (1 - a)) / math.sqrt(b * root**2 + a)


_FREEDOM = 10  # below, the variance within batches is too uncertain to compare with
_LEAST = 1e-6  # of all variance; batches of one label each have none within


def example_means(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of each example, (N, C), of those that have values.

    Args:
        values: The values, (N, C, positions).
        weights: Those of the positions, (N, 1, positions); all count alike if None.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if weights is None:
        return values.mean(2)
    total = weights.sum(2)
    means = torch.where(weights > 0, values * weights, 0).sum(2) / total
    return means[total[:, 0] > 0]
