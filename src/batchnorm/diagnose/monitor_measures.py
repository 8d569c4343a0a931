"""What a monitor measures of a layer's batch, in bounded time and without random numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.observe import Seen
from batchnorm.moments import Moments

PERCENTILES = (15, 50, 85)
#: Of so many channels there are percentiles.
CHANNELS = 4
#: From so many values each.
VALUES = 1024
#: A channel whose output deviates by less from its mean is dead: a hundredth of what it is made to.
DEAD = 0.01

_GOLDEN = 0.6180339887498949  # the ratio whose multiples leave the most even gaps


class Record(NamedTuple):
    """What was measured of a layer in a step; NaN for what there is not.

    Attributes:
        step: The number of steps before it.
        layer: The name of the layer.
        percentiles: The 15th, 50th and 85th percentile of the input, of a few channels.
        since: How many steps before the layer's previous record was.
        mean: The mean of the input, over all channels.
        var: The mean of the channels' variances.
        moved: The distance from the moments of the previous record, a mean over channels.
        from_running: The distance from the running statistics, as they were before the step.
        dead: The share of dead channels.
        weight_mean: The mean of the weight.
        weight_least: The smallest |weight|.
        weight_most: The largest |weight|.
        bias_mean: The mean of the bias.
        bias_least: The smallest |bias|.
        bias_most: The largest |bias|.
        weight_grad: The norm of the weight's gradient, as the optimizer used it.
        bias_grad: That of the bias's.
    """

    step: int
    layer: str
    percentiles: list[list[float]]
    since: float
    mean: float
    var: float
    moved: float
    from_running: float
    dead: float
    weight_mean: float
    weight_least: float
    weight_most: float
    bias_mean: float
    bias_least: float
    bias_most: float
    weight_grad: float
    bias_grad: float


#: The numbers of a record; the last two are known at the end of the step.
MEASURES = Record._fields[3:]


class Measured(NamedTuple):
    """What is measured while the network runs; what can wait is done when it is over.

    Attributes:
        numbers: Those of a record from `mean` to `bias_most`, on the device of the batch.
        sample: Values of the chosen channels, (C, VALUES) at most, NaN for what is not there.
        moments: Of the batch.
    """

    numbers: Tensor
    sample: Tensor
    moments: Moments


def measure(layer: _BatchNorm, seen: Seen, previous: Moments | None) -> Measured | None:
    """Measure a batch; None of an empty one.

    Args:
        layer: The layer, before it works.
        seen: What it got.
        previous: The moments of its previous record.
    """
    values, weights = seen.rows()
    if values.numel() == 0:
        return None
    moments = Moments.of(values, weights=weights)
    mean, var = moments.mean, moments.var()
    moved = from_running = mean.new_tensor(torch.nan)
    if previous is not None:
        moved = distance(mean, var, previous.mean, previous.var(), layer.eps).mean()
    if layer.running_mean is not None and layer.running_var is not None:
        unbiased = moments.var(correction=1)  # as the running one is
        from_running = distance(
            mean, unbiased, layer.running_mean, layer.running_var, layer.eps
        ).mean()
    # by the table, for to ask a layer would compute what is parametrized anew
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    deviation = (var / (var + layer.eps)).sqrt()
    if weight is not None:
        deviation = deviation * weight.detach().to(deviation).abs()
    dead = (deviation < DEAD).to(mean.dtype).mean()
    numbers = torch.cat(
        [
            torch.stack([mean.mean(), var.mean(), moved, from_running, dead]),
            _extent(weight, mean),
            _extent(bias, mean),
        ]
    )
    return Measured(numbers, _sample(values, weights), moments)


def distance(mean: Tensor, var: Tensor, mean_2: Tensor, var_2: Tensor, eps: float) -> Tensor:
    """Return the symmetric Kullback-Leibler divergence of normal distributions, by channel.

        KL(p || q) + KL(q || p) = ((v - w)^2 + (m - n)^2 (v + w)) / (2 v w)

    where v and w are the variances with eps, which is what the layer divides by: without it a
    channel that is constant would be infinitely far from any other.

    Args:
        mean: Of the first, (C,), in float64 where the device has it.
        var: Likewise.
        mean_2: Of the second.
        var_2: Likewise.
        eps: Of the layer.

    Example:
        >>> zero, one, two = (torch.tensor([value]) for value in (0.0, 1.0, 2.0))
        >>> distance(zero, one, two, one, eps=0)
        tensor([4.])
        >>> distance(zero, one, zero, two, eps=0)
        tensor([0.2500])
    """
    v, w = var + eps, var_2.to(var) + eps
    square = (mean - mean_2.to(mean)).square()
    return ((v - w).square() + square * (v + w)) / (2 * v * w)


def chosen(channels: int) -> list[int]:
    """Return which channels there are percentiles of, evenly over all.

    Args:
        channels: How many there are.

    Example:
        >>> chosen(64), chosen(2)
        ([0, 21, 42, 63], [0, 1])
    """
    count = min(channels, CHANNELS)
    return [round(at * (channels - 1) / max(count - 1, 1)) for at in range(count)]


def drawn(count: int, device: torch.device | str) -> Tensor:
    """Return which values the percentiles are from: the same each time, with no period.

    A fixed stride through images would see one column of them. Multiples of the golden ratio, of
    which only what is after the point counts, come everywhere and repeat nothing.

    Args:
        count: How many values there are.
        device: Where the answer is to be.

    Example:
        >>> len(drawn(10**6, "cpu")), drawn(3, "cpu")
        (1024, tensor([0, 1, 2]))
    """
    if count <= VALUES:
        return torch.arange(count, device=device)
    at = torch.arange(VALUES, dtype=torch.float64) * _GOLDEN % 1 * count
    return at.long().to(device)


def percentiles(sample: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the percentiles of each row, interpolated as NumPy does it, without what is NaN.

    Args:
        sample: A row a channel.

    Example:
        >>> percentiles(np.array([[4, 1, 2, 3, np.nan, 5]])).round(2)
        array([[1.6, 3. , 4.4]])
    """
    ordered = np.sort(sample, axis=1)  # NaN comes last
    last = np.maximum((~np.isnan(ordered)).sum(1, keepdims=True) - 1, 0)
    at = last * np.array(PERCENTILES) / 100
    below = at.astype(int)
    low, high = (np.take_along_axis(ordered, i, 1) for i in (below, np.minimum(below + 1, last)))
    with np.errstate(invalid="ignore"):  # between infinities there is nothing
        found: NDArray[np.float64] = low + (high - low) * (at - below)
    return found


def _sample(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return values of the chosen channels, a row each."""
    examples, channels, positions = values.shape
    places = drawn(examples * positions, values.device)
    example, position = places // positions, places % positions
    of = torch.tensor(chosen(channels), device=values.device)
    some = values[example, of[:, None], position]
    some = some.to(torch.promote_types(some.dtype, torch.float32))
    if weights is not None:
        some = some.masked_fill(weights[example, 0, position] == 0, torch.nan)
    return some


def _extent(parameter: Tensor | None, like: Tensor) -> Tensor:
    """Return the mean of a parameter, and the smallest and the largest of its absolute values."""
    if parameter is None:
        return like.new_full((3,), torch.nan)
    values = parameter.detach().to(like)
    size = values.abs()
    return torch.stack([values.mean(), size.min(), size.max()])
