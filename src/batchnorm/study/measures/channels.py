"""A layer that normalizes by channel, beside one that normalizes by position, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

import batchnorm as bn
from batchnorm.study.data import DataSet
from batchnorm.study.descent import one_thread
from batchnorm.study.measures.implementations import NORMALIZE, furthest
from batchnorm.study.tasks import Outcome, Task

EXAMPLES = 60  # as in a step of training; fewer if they are large
POSITIONS = 2**16  # of all of them together
CHANNELS = 8  # of the convolution
ROWS, PERMUTED = "rows (N·H·W, C)", "positions permuted"
ROLLED, BY_POSITION = "rolled, moments by channel", "rolled, moments by position"


@dataclass(frozen=True, kw_only=True)
class Compared(Outcome):
    """What came of normalizing the same feature maps in two ways that may be one.

    Attributes:
        largest: By what was done, and by the implementation, the largest difference.
        parameters: How many numbers a layer learns with one gamma and beta a channel, and with
            one for each channel and position.
    """

    largest: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    parameters: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Channels(Task[Compared]):
    """Feature maps of the data, normalized by channel, and by channel and position.

    Attributes:
        seed: What the examples, the filters, gamma and beta, and all displacements are drawn by.
    """

    kind = "channels"
    outcome = Compared

    seed: int

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes."""
        return 0.2

    def perform(self, data_set: DataSet) -> Compared:
        """Compare."""
        _, height, width = data_set.shape
        draw = np.random.default_rng(self.seed)
        count = max(2, min(EXAMPLES, POSITIONS // (height * width)))
        order = draw.permutation(len(data_set.train_inputs))[:count]
        x = torch.from_numpy(data_set.train_inputs[order]).double()
        filters = torch.from_numpy(draw.standard_normal((CHANNELS, x.shape[1], 3, 3)))
        gamma, beta = torch.from_numpy(draw.standard_normal((2, CHANNELS)))
        moves = draw.integers(0, (height, width), (len(x), 2)).tolist()
        places = torch.from_numpy(draw.random((len(x), 1, height * width)).argsort())
        with one_thread():
            maps, rolled = _convolved(x, filters), _convolved(_rolled(x, moves), filters)
            largest: dict[str, dict[str, float]] = {
                ROWS: {},
                PERMUTED: {},
                ROLLED: {},
                BY_POSITION: {},
            }
            for name, normalize in NORMALIZE.items():
                y = normalize(maps, gamma, beta)
                rows = normalize(maps.movedim(1, -1).flatten(0, 2), gamma, beta)
                rows = rows.view(len(x), height, width, CHANNELS).movedim(-1, 1)
                largest[ROWS][name] = furthest(rows, y)
                permuted = normalize(_permuted(maps, places), gamma, beta)
                largest[PERMUTED][name] = furthest(permuted, _permuted(y, places))
                largest[ROLLED][name] = furthest(normalize(rolled, gamma, beta), _rolled(y, moves))
                largest[BY_POSITION][name] = furthest(
                    _by_position(normalize, rolled), _rolled(_by_position(normalize, maps), moves)
                )
        layers = bn.BatchNorm2d(CHANNELS), bn.BatchNorm1d(CHANNELS * height * width)
        learned = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        return Compared(largest=largest, parameters=learned)

    def __str__(self) -> str:
        return f"moments by channel, seed {self.seed}"


def _convolved(x: Tensor, filters: Tensor) -> Tensor:
    """Convolve circularly, so that what leaves a picture on one side comes in on the other."""
    return conv2d(pad(x, (1, 1, 1, 1), mode="circular"), filters)


def _rolled(x: Tensor, moves: Sequence[tuple[int, int]]) -> Tensor:
    """Move each example circularly, by its own number of rows and columns."""
    pairs = zip(x, moves, strict=True)
    return torch.stack([one.roll(tuple(move), (1, 2)) for one, move in pairs])


def _permuted(x: Tensor, places: Tensor) -> Tensor:
    """Take the positions of each example in another order."""
    return x.flatten(2).gather(2, places.expand(-1, x.shape[1], -1)).view_as(x)


def _by_position(normalize: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Normalize with a mean and a variance for each channel and position."""
    features = x.flatten(1)
    one = torch.ones(features.shape[1], dtype=x.dtype)
    return normalize(features, one, torch.zeros_like(one)).view_as(x)
