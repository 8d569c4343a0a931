"""What a layer got over all batches, in the memory of its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.diagnose.check.padding import Padding
from batchnorm.diagnose.check.spread import Spread, example_means
from batchnorm.diagnose.observe import Seen
from batchnorm.moments import Moments


class SeenByLayer:
    """What a layer got.

    Attributes:
        moments: Those of all values that were finite; None if there were none.
        spread: How the examples' means are spread.
        squares: How the means of their squares are, around a point in the middle.
        padding: How much of it is padding.
        calls: How often the layer was called.
        not_finite: How many of the calls had values that are not finite.
        resolution: Relative to the mean, what a constant channel varies by from rounding.
        positions: The largest number of values that an example has in a channel.
    """

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.spread, self.squares, self.padding = Spread(), Spread(), Padding()
        self._middle: Tensor | None = None
        self.calls = self.not_finite = self.positions = 0
        self.resolution = 8 * torch.finfo(torch.float32).eps  # sums in another order

    def add(self, seen: Seen, examples: int | None, is_first: bool) -> None:
        """Add a call.

        Args:
            seen: What the layer got.
            examples: How many examples the batch has, where that is known.
            is_first: Whether it is the first call for this batch.
        """
        self.calls += 1
        values, weights = seen.rows()
        if not values.is_floating_point() or not values.numel():
            return
        finite = values.isfinite() if weights is None else values.isfinite() | (weights == 0)
        if not bool(finite.all()):
            self.not_finite += 1
            return
        self.resolution = max(self.resolution, torch.finfo(values.dtype).eps)
        found = Moments.of(values, weights=weights)
        self.moments = found if self.moments is None else self.moments + found
        if not is_first:  # another call has other values, which are no other batch
            return
        if seen.mask is None and seen.x.ndim == 3:
            self.padding.add(values)
        values, weights = seen.rows(examples=examples)
        self.positions = max(self.positions, values.shape[2])
        if self._middle is None:
            self._middle = found.mean.to(torch.promote_types(values.dtype, torch.float32))[:, None]
        means = example_means(values, weights)
        if len(means):
            self.spread.add(means)
            self.squares.add(example_means((values - self._middle).square(), weights))

    def variance(self) -> Tensor:
        """Return the variance of all values, (C,)."""
        assert self.moments is not None  # or there is nothing to ask about
        return self.moments.var()

    def constant(self) -> Tensor:
        """Return which channels are constant, to rounding."""
        assert self.moments is not None
        rounding = self.resolution * self.moments.mean.abs()
        return self.variance() <= rounding.square()
