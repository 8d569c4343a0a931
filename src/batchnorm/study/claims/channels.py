"""Claim 19: for convolutions one mean and variance a channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

import batchnorm as bn
from batchnorm.study.charts import Chart
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.data import DataSet
from batchnorm.study.descent import one_thread
from batchnorm.study.interval import short
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.implementations import NORMALIZE, furthest
from batchnorm.study.measures.runs import NotMeasured
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.tasks import Outcome, Task

_EXAMPLES = 60  # as in a step of training; fewer if they are large
_POSITIONS = 2**16  # of all of them together
_CHANNELS = 8  # of the convolution
_TOLERANCE = 1e-12  # float64 rounds at 1e-16
_FAR = 1e-3  # what no rounding explains
_FLOOR = 1e-17  # where no difference is drawn, as a logarithm has no 0
_ROWS, _PERMUTED = "rows (N·H·W, C)", "positions permuted"
_ROLLED, _BY_POSITION = "rolled, moments by channel", "rolled, moments by position"


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
        count = max(2, min(_EXAMPLES, _POSITIONS // (height * width)))
        order = draw.permutation(len(data_set.train_inputs))[:count]
        x = torch.from_numpy(data_set.train_inputs[order]).double()
        filters = torch.from_numpy(draw.standard_normal((_CHANNELS, x.shape[1], 3, 3)))
        gamma, beta = torch.from_numpy(draw.standard_normal((2, _CHANNELS)))
        moves = draw.integers(0, (height, width), (len(x), 2)).tolist()
        places = torch.from_numpy(draw.random((len(x), 1, height * width)).argsort())
        with one_thread():
            maps, rolled = _convolved(x, filters), _convolved(_rolled(x, moves), filters)
            largest: dict[str, dict[str, float]] = {
                _ROWS: {},
                _PERMUTED: {},
                _ROLLED: {},
                _BY_POSITION: {},
            }
            for name, normalize in NORMALIZE.items():
                y = normalize(maps, gamma, beta)
                rows = normalize(maps.movedim(1, -1).flatten(0, 2), gamma, beta)
                rows = rows.view(len(x), height, width, _CHANNELS).movedim(-1, 1)
                largest[_ROWS][name] = furthest(rows, y)
                permuted = normalize(_permuted(maps, places), gamma, beta)
                largest[_PERMUTED][name] = furthest(permuted, _permuted(y, places))
                largest[_ROLLED][name] = furthest(normalize(rolled, gamma, beta), _rolled(y, moves))
                largest[_BY_POSITION][name] = furthest(
                    _by_position(normalize, rolled), _rolled(_by_position(normalize, maps), moves)
                )
        layers = bn.BatchNorm2d(_CHANNELS), bn.BatchNorm1d(_CHANNELS * height * width)
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


def tasks(plan: Plan, part: str) -> list[Channels]:
    """Return a task for each seed, if the examples have positions."""
    _, height, width = plan.shape
    return [Channels(plan.data, seed) for seed in plan.seeds] if height * width > 1 else []


def _found(plan: Plan, part: str, store: Store) -> list[Compared]:
    outcomes = [store[task] for task in tasks(plan, part)]
    if not outcomes:
        raise NotMeasured("The examples are features, and have no positions.")
    for outcome in outcomes:
        if outcome.reason:
            raise NotMeasured(f"A batch was not compared: {outcome.reason}.")
    return outcomes


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Find the largest differences."""
    found = _found(plan, part, store)
    by_channel, by_position = found[0].parameters
    # By what was done, the largest difference of any implementation, for each seed.
    done = {what: [max(of.largest[what].values()) for of in found] for what in found[0].largest}
    exact = max(max(done[what]) for what in (_ROWS, _PERMUTED, _ROLLED))
    least = min(min(of.largest[_BY_POSITION].values()) for of in found)
    return Finding(
        part,
        f"{_CHANNELS} feature maps are normalized with {by_channel} learned numbers; with "
        f"moments by position there would be {by_position}. The result is that of the "
        f"{_CHANNELS} columns of all positions, it moves with the picture, and any order of the "
        f"positions gives the same, all within {exact:.0e}. With moments by position, moving the "
        f"pictures changes the result by {short(least)} or more.",
        f"within {exact:.0e}",
        short(least),
        f"{exact:.0e}",
        {
            "the same as of all positions as rows": max(done[_ROWS]) <= _TOLERANCE,
            "one γ and one β a channel": by_channel == 2 * _CHANNELS,
            "the same in any order of the positions": max(done[_PERMUTED]) <= _TOLERANCE,
            "moves with the picture": max(done[_ROLLED]) <= _TOLERANCE,
            "does not with moments by position": least > _FAR,
        },
        [
            Row(name, f"largest difference, {what}", [of.largest[what][name] for of in found])
            for what in found[0].largest
            for name in found[0].largest[what]
        ]
        + [Row("by channel", "learned numbers", [by_channel])]
        + [Row("by position", "learned numbers", [by_position])],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the differences."""
    caption = (
        "The largest difference between normalizing, then moving each picture circularly, and "
        "moving it first. Each dot is a batch. The dotted line is what rounding may do."
    )
    found = [of for part in parts for of in _found(plan, part, store)]
    panels = [
        beside(
            what.removeprefix("rolled, "),
            "largest difference",
            {name: [max(of.largest[what][name], _FLOOR) for of in found] for name in NORMALIZE},
            styles=("other", "torch", "batchnorm"),
            log=True,
            start=_FLOOR,
            end=1e3,
            goal=(_TOLERANCE, "rounding"),
        )
        for what in (_ROLLED, _BY_POSITION)
    ]
    return [Chart("moments-by-channel", caption, panels)]


CLAIM = Claim(
    number=19,
    name="channels",
    title="One mean and variance a channel",
    says="Behind a convolution, all positions of a channel are normalized by one mean and one "
    "variance, so that normalization obeys the convolutional property: what is found at one place "
    "is found in the same way at another. There are one γ and one β a channel.",
    source="lecture notes; Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.2",
    measured=f"For each seed {_EXAMPLES} training examples are drawn (fewer if they have more than "
    f"{_POSITIONS} positions together) and convolved circularly with {_CHANNELS} random filters of "
    "3×3, in float64. The feature maps are normalized by batchnorm.reference, torch.nn and "
    "batchnorm, with random γ and β: as they are; as a matrix of N·H·W rows and C columns; with "
    "the positions of each example in a random order; and with each picture first rolled "
    "circularly by a random number of rows and columns. The last one is done again with a mean "
    "and a variance for each channel and position. What is compared is put back in its place.",
    rule=f"It holds if with moments by channel no value differs by more than {_TOLERANCE:g}, if a "
    "layer learns two numbers a channel, and if with moments by position, the largest difference "
    f"of each batch that is rolled is above {_FAR:g}.",
    unit="largest difference when pictures move: by position, by channel",
    parts=("layer",),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
