"""Padding in the statistics: positions at the ends of sequences that are no data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.diagnose.check.finding import Finding

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known

#: Of the positions. The variance is then off by as much, and the standard deviation by half of it.
_SHARE = 0.05
#: How often, relative to the padding, the same may be seen between data.
_INSIDE = 0.1


class Padding:
    """How much of sequences is padding: the same vector, over and over, at one end of some of them.

    Attributes:
        positions: The number of positions.
        padded: The number of those that are padding.
        sequences: The number of sequences that have any.
    """

    def __init__(self) -> None:
        self.positions = self.padded = self.sequences = 0

    def add(self, values: Tensor) -> None:
        """Add a batch.

        Args:
            values: It, (examples, channels, positions).
        """
        examples, channels, length = values.shape
        self.positions += examples * length
        if channels < 2 or length < 2:  # in one channel, equal values are nothing special
            return
        flipped = values.flip(2)
        ends = [(ends, _runs(ends, ends[:, :, -1:])) for ends in (values, flipped)]
        where, runs = max(ends, key=lambda end: int(end[1].max()))
        if int(runs.max()) < 2:
            return
        vector = where[int(runs.argmax()), :, -1:]
        padded = (_runs(values, vector) + _runs(flipped, vector)).clamp(max=length)
        inside = int((values == vector).all(1).sum()) - int(padded.sum())
        # a part of the sequences, and at their ends: after a ReLU, zeros may be anywhere
        if int(padded.min()) < int(padded.max()) and inside < _INSIDE * int(padded.sum()):
            self.padded += int(padded.sum())
            self.sequences += int((padded > 0).sum())


def _runs(values: Tensor, vector: Tensor) -> Tensor:
    """Return how many positions at the end of each example are equal to a vector."""
    same = (values == vector).all(1)
    return torch.cumprod(same.flip(1).to(torch.int64), 1).sum(1)


def find(known: Known) -> Iterator[Finding]:
    """Find layers that take padding into their moments."""
    for name, seen in known.seen.items():
        padding = seen.padding
        share = padding.padded / max(padding.positions, 1)
        if name in known.layers and padding.sequences > 1 and share > _SHARE:
            yield Finding(
                "padding_in_statistics",
                "warning",
                name,
                f"{share:.0%} of the positions are the same vector at an end of "
                f"{padding.sequences} sequences, and the layer gets no mask",
                "padding counts as data: the moments depend on how much of it a batch has",
                f"{known.spelled(name)}(x, mask=torch.arange(x.shape[-1]) < lengths[:, None])"
                if known.is_ours(name)
                else f"bn.convert(model, where={name!r})  # then pass mask= to the layer",
            )
