"""The one statistic of the package: the moments of every channel, and their exact merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.positions import Groups, over_channels, sum_positions


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return what statistics are kept in: float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class Moments:
    """How many values each channel has, their mean, and their spread.

    Moments merge with `+`, exactly and in any order, by Chan's update,

        delta = b.mean - a.mean
        count = a.count + b.count
        mean  = a.mean + delta * b.count / count
        m2    = a.m2 + b.m2 + delta^2 * a.count * b.count / count

    so that a data set has one answer however it is split. `Moments.none(C)` is the identity of `+`.
    They are float64 (float32 on a device without it): C numbers, whatever the size of the batch.

    Those of several groups stand together, one a row: mean and m2 are (G, C), count is (G, 1).

    Attributes:
        count: Number of values per channel, or the sum of their weights: a number, or a tensor
            of one where only the device knows it.
        mean: Their mean, (C,), in the unit of the values.
        m2: The sum of their squared distances from the mean, (C,), in that unit squared.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0], [5], [8], [9], [11], [24]])
        >>> moments = Moments.of(x[:2]) + Moments.of(x[2:])
        >>> moments.mean, moments.var()
        (tensor([10.], dtype=torch.float64), tensor([46.], dtype=torch.float64))

    Source:
        Chan, Golub & LeVeque, Updating formulae and a pairwise algorithm for computing sample
        variances, 1979.
    """

    count: Tensor | float
    mean: Tensor
    m2: Tensor

    @classmethod
    def none(cls, num_features: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values at all, the identity of `+`.

        Args:
            num_features: Number of channels, C.
            device: Where; torch's default device if left out.

        Example:
            >>> Moments.none(3)
            Moments(count=0, channels=3)
        """
        dtype = statistics_dtype(torch.device(device or torch.get_default_device()))
        zeros = torch.zeros(num_features, dtype=dtype, device=device)
        return cls(0, zeros, zeros)

    @classmethod
    def of(
        cls,
        x: Tensor,
        *,
        channel_dim: int = 1,
        weights: Tensor | None = None,
        ghost_size: int | None = None,
    ) -> Moments:
        """Return the moments of a batch, summed around a shift so that no digits are lost.

        The mean in the precision of `x` is only a shift close to the data. The sums run over
        x - shift, so that their error is relative to the deviation, however large the mean.

        Args:
            x: The batch, real floating point, with C channels along `channel_dim`.
            channel_dim: The channels' dimension; all others are summed over.
            weights: How often each position counts: of the rank of `x`, with size 1 along
                `channel_dim`. A value of weight 0 is not there, be it NaN.
            ghost_size: Number of examples in a group; there is one group of all if left out. See
                `Groups`.

        Example:
            >>> import torch
            >>> Moments.of(torch.ones(8, 3, 5, 5))
            Moments(count=200, channels=3)
            >>> Moments.of(torch.ones(8, 3, 5, 5), ghost_size=2).mean.shape
            torch.Size([4, 3])
        """
        kept = statistics_dtype(x.device)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = Groups.of(x.shape, channel_dim, ghost_size)
        count: Tensor | float
        if weights is not None:
            weights = weights.to(x.dtype)
            x = present(x, weights)
            places = weights.to(kept).expand_as(x.narrow(channel_dim, 0, 1))
            count = places.sum() if groups is None else groups.sum_positions(places, channel_dim)
        elif groups is not None:
            count = groups.counts(kept, x.device)
        else:
            values: Tensor | int = x.numel() // max(x.shape[channel_dim], 1)
            # to torch.jit.trace a size is a tensor
            count = values.to(kept) if isinstance(values, Tensor) else values

        def total(values: Tensor) -> Tensor:
            if weights is not None:  # 0 * inf would be NaN, where a square of padding overflows
                values = torch.where(weights == 0, 0, values * weights)
            return sum_positions(values, channel_dim, groups)

        with torch.no_grad():  # both x and the mean shift by it: no gradient goes through it
            shift = divide(total(x), count).to(x.dtype)
        distance = x - over_channels(shift, x.ndim, channel_dim, groups)
        rest = divide(total(distance).to(kept), count)
        square = distance.square() if torch.is_grad_enabled() else distance.square_()
        m2 = total(square).to(kept) - rest.square() * count
        return cls(count, shift + rest, m2.clamp(min=0))

    def var(self, correction: float = 0) -> Tensor:
        """Return m2 / (count - correction), (C,); 0 where there are too few values for it.

        Args:
            correction: 0 for the variance of these values, 1 for an unbiased estimate of that of
                the population they were drawn from.

        Example:
            >>> import torch
            >>> Moments.of(torch.tensor([[1.0], [3.0]])).var(correction=1)
            tensor([2.], dtype=torch.float64)
        """
        return divide(self.m2, self.count - correction)

    def inverse_std(self, eps: float, correction: float = 0) -> Tensor:
        """Return 1 / sqrt(var + eps), (C,); 0 where there are no values to normalize by.

        Args:
            eps: Added to the variance, in its unit.
            correction: As for `var`.

        Example:
            >>> import torch
            >>> Moments.of(torch.tensor([[1.0], [5.0]])).inverse_std(eps=0)
            tensor([0.5000], dtype=torch.float64)
        """
        inverse = (self.var(correction) + eps).rsqrt()
        if isinstance(self.count, Tensor):
            return torch.where(self.count > 0, inverse, 0)
        return inverse if self.count > 0 else torch.zeros_like(inverse)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        delta = other.mean - self.mean
        step = divide(delta * other.count, count)
        return Moments(count, self.mean + step, self.m2 + other.m2 + delta * (step * self.count))

    def merged(self) -> Moments:
        """Return the moments of all groups taken together; of one group, these themselves.

        All at once, by the same update: m2 is the sum of theirs and of what lies between them.

        Example:
            >>> import torch
            >>> Moments.of(torch.randn(8, 3), ghost_size=2).merged()
            Moments(count=8, channels=3)
        """
        if self.mean.ndim == 1:
            return self
        count = self.count if isinstance(self.count, Tensor) else self.mean.new_tensor(self.count)
        weights = count.expand(self.mean.shape[0], 1)
        total = weights.sum()
        means, m2s = (torch.where(weights == 0, 0, v) for v in (self.mean, self.m2))
        first = means[0]  # means may be large, and their distances small
        mean = first + divide(((means - first) * weights).sum(0), total)
        m2 = m2s.sum(0) + ((means - mean).square() * weights).sum(0)
        return Moments(total, mean, m2)

    @classmethod
    def sum(cls, parts: Iterable[Moments]) -> Moments:
        """Return the moments of at least one part taken together.

        Args:
            parts: Moments of the same number of channels.

        Raises:
            TypeError: There are no parts.

        Example:
            >>> import torch
            >>> Moments.sum(Moments.of(batch) for batch in torch.randn(10, 4, 3))
            Moments(count=40, channels=3)
        """
        return reduce(add, parts)

    def detach(self) -> Moments:
        """Return the same moments, cut from the autograd graph.

        Example:
            >>> import torch
            >>> Moments.of(torch.randn(8, 3, requires_grad=True)).detach().mean.requires_grad
            False
        """
        count = self.count.detach() if isinstance(self.count, Tensor) else self.count
        return Moments(count, self.mean.detach(), self.m2.detach())

    def __repr__(self) -> str:
        count = self.count.sum() if isinstance(self.count, Tensor) else self.count
        groups = "" if self.mean.ndim == 1 else f", groups={self.mean.shape[0]}"
        return f"Moments(count={float(count):g}, channels={self.mean.shape[-1]}{groups})"


pytree.register_dataclass(Moments)  # torch.func and torch.export look inside


def divide(values: Tensor, count: Tensor | float) -> Tensor:
    """Return values / count, and 0 where the count is not positive."""
    if isinstance(count, Tensor):
        tiny = torch.finfo(count.dtype).tiny
        return torch.where(count > 0, values / count.clamp(min=tiny), 0)
    return values / count if count > 0 else torch.zeros_like(values)


def present(x: Tensor, weights: Tensor) -> Tensor:
    """Return `x` with 0 for what is of weight 0 and not finite (padding may hold anything)."""
    return torch.where((weights == 0) & ~x.isfinite(), 0, x)
