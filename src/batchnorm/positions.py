"""The positions of a batch: which are summed together, and which groups of examples they make."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """How a batch falls into groups of consecutive examples, each normalized on its own.

    All have `size` examples but the last, which has the rest. A rest that would have a single value
    a channel, and so no variance, joins the group before it.

    Attributes:
        size: Number of examples in a group.
        number: Number of groups, G.
        examples: Number of examples in the batch, N.
        places: Number of values a channel has in an example.
        dim: The examples' dimension: the first that is not the channels'.
    """

    size: int
    number: int
    examples: int
    places: int
    dim: int

    @classmethod
    def of(cls, shape: tuple[int, ...], channel_dim: int, ghost_size: int | None) -> Groups | None:
        """Return the groups of a batch of that shape, or None if it is not cut into any.

        Args:
            shape: Of the batch.
            channel_dim: The channels' dimension.
            ghost_size: Number of examples in a group; None for one group of all.

        Example:
            >>> Groups.of((10, 3, 5, 5), 1, 4)
            Groups(size=4, number=3, examples=10, places=25, dim=0)
            >>> Groups.of((9, 3), 1, 4).lengths()
            [4, 5]
        """
        if ghost_size is None or len(shape) == 1:
            return None
        channel = channel_dim % len(shape)
        dim = 1 if channel == 0 else 0
        places = 1
        for at, size in enumerate(shape):
            if at not in (dim, channel):
                places *= size
        # of what a compiler has for sizes; `rest == 1` last, for each answer is a graph of its own
        full, rest = shape[dim] // ghost_size, shape[dim] % ghost_size
        alone = places == 1 and rest == 1
        number = max(1, full + 1 if rest > 0 and not alone else full)
        return cls(ghost_size, number, shape[dim], places, dim)

    @property
    def last(self) -> int:
        """The number of examples in the last group."""
        return self.examples - (self.number - 1) * self.size

    @property
    def shortest(self) -> int:
        """The number of examples in the smallest group."""
        return self.last if self.number == 1 else min(self.size, self.last)

    def lengths(self) -> list[int]:
        """Return the number of examples in each group."""
        return [self.size] * (self.number - 1) + [self.last]

    def counts(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the number of values a channel of each group, (G, 1)."""
        first = (self.number - 1, 1), self.size * self.places
        last = (1, 1), self.last * self.places
        return torch.cat([torch.full(*part, dtype=dtype, device=device) for part in (first, last)])

    def sum_positions(self, values: Tensor, channel_dim: int) -> Tensor:
        """Return the sums over the positions of each group, (G, C)."""
        channel = channel_dim % values.ndim
        dims = [d for d in range(values.ndim) if d not in (self.dim, channel)]
        sums = values.sum(dims) if dims else values  # (N, C)
        if channel < self.dim:
            sums = sums.T
        return self._sum_examples(sums)

    def spread(self, values: Tensor, ndim: int, channel_dim: int) -> Tensor:
        """Return the numbers of the groups, (G, C), in a shape that broadcasts over the batch."""
        channel = channel_dim % ndim
        first, last = values[:-1].repeat_interleave(self.size, 0), values[-1:]
        each = torch.cat([first, last.expand(self.last, -1)])
        shape = [1] * ndim
        shape[self.dim], shape[channel] = each.shape
        return (each.T if channel < self.dim else each).reshape(shape)

    def _sum_examples(self, sums: Tensor) -> Tensor:
        """Return the sums of each group's rows, (G, C), of numbers an example, (N, C)."""
        whole = self.number - 1
        cut = whole * self.size
        first = sums[:cut].reshape(whole, self.size, sums.shape[-1])
        return torch.cat([first.sum(1), sums[cut:].sum(0, keepdim=True)])


def sum_positions(values: Tensor, channel_dim: int, groups: Groups | None = None) -> Tensor:
    """Return the sum over all dimensions but the channels', (C,), or that of each group, (G, C)."""
    if groups is not None:
        return groups.sum_positions(values, channel_dim)
    dims = [d for d in range(values.ndim) if d != channel_dim % values.ndim]
    return values.sum(dims) if dims else values  # over no dimension, torch sums over all


def over_channels(
    values: Tensor, ndim: int, channel_dim: int, groups: Groups | None = None
) -> Tensor:
    """Return a number a channel, (C,) or (G, C), in a shape that broadcasts over a batch."""
    if groups is not None:
        return groups.spread(values, ndim, channel_dim)
    if channel_dim in (-1, ndim - 1):
        return values
    shape = [1] * ndim
    shape[channel_dim] = -1
    return values.reshape(shape)
