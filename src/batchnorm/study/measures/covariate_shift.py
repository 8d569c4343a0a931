"""What shifts of the inputs do to a network: its accuracy, the same adapted, and a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study.interval import difference
from batchnorm.study.networks import norms
from batchnorm.study.observation import Result, State
from batchnorm.study.shifts import SEVERITIES, SHIFTS, applies, shift

MOST = 500  # examples to adapt on, and as many to try
SHARE = 3  # one in so many of them is scored
SAMPLES = 100  # of clean examples, to count false alarms
RATE = 0.05  # of false alarms, by intent


def shifted_and_adapted(state: State) -> dict[str, Any] | None:
    """Return what shifts of the held-out inputs do to a network at the end of its run.

    One half of the examples is there to adapt on, without labels, the other to try. What is scored
    is from the half to try.

    Returns:
        By the name of the shift, for each severity: the accuracy as it was trained and when
        adapted, in percent, the score, and 1 where it is flagged. `clean` has the same of the
        inputs as they are, and `alarms` the share of clean samples that are flagged.
    """
    if not state.last:
        return None
    x, y = state.held_out
    half = min(len(y) // 2, MOST)
    chosen, tried, labels = x[:half], x[half : 2 * half], y[half : 2 * half]
    size = max(half // SHARE, 2)
    values = state.data_set.train_inputs
    low, high = float(values.min()), float(values.max())
    trained = state.copy().eval()

    def shifted(x: Tensor, name: str, severity: int, seed: int) -> Tensor:
        inputs = x.float().numpy()
        return torch.from_numpy(shift(inputs, name, severity, low=low, high=high, seed=seed)).to(x)

    def look(to_adapt: Tensor, to_try: Tensor) -> list[float]:
        score, flagged = _scored(trained, to_try[:size])
        before = _accuracy(trained, to_try, labels)
        if not norms(trained):
            return [before, before, score, flagged]
        report = bn.adapt(trained, [to_adapt], progress=False)
        after = _accuracy(trained, to_try, labels)
        report.undo()
        return [before, after, score, flagged]

    found: dict[str, Any] = {
        name: [
            look(shifted(chosen, name, severity, 0), shifted(tried, name, severity, 1))
            for severity in SEVERITIES
        ]
        for name in SHIFTS
        if applies(name, state.data_set.shape)
    }
    draw = np.random.default_rng(0)
    samples = [tried[draw.permutation(half)[:size]] for _ in range(SAMPLES)]
    alarms = float(np.mean([_scored(trained, sample)[1] for sample in samples]))
    return {**found, "clean": look(chosen, tried), "alarms": alarms}


def _scored(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the score, and 1 if it is a shift; nothing without normalization."""
    if not norms(model):
        return 0.0, 0.0
    report = bn.measure_shift(model, [x], train_batch_size=60, progress=False)
    return min(report.score, 1e30), float(report.shifted)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


@dataclass(frozen=True)
class Seen:
    """What shifts did to the networks of all seeds, which are the last dimension.

    Attributes:
        names: The shifts.
        looks: By shift, severity, and what was looked at: accuracy, the same adapted, the score,
            and whether it is flagged.
        clean: By what was looked at, on inputs as they are.
        alarms: The share of clean samples that are flagged.
    """

    names: Sequence[str]
    looks: NDArray[np.float64]
    clean: NDArray[np.float64]
    alarms: NDArray[np.float64]


def seen(results: Sequence[Result]) -> Seen:
    """Return what was seen at the end of the runs of all seeds."""
    found = [result.seen(shifted_and_adapted)[-1] for result in results]
    names = [name for name in SHIFTS if name in found[0]]
    looks = np.array([[of[name] for of in found] for name in names])
    clean = np.array([of["clean"] for of in found]).T
    return Seen(names, np.moveaxis(looks, 1, -1), clean, np.array([of["alarms"] for of in found]))


def flagged_share(of: Seen, severity: int) -> list[float]:
    """Return, by seed, the share of the shifts from a severity on that the score flags."""
    flagged = of.looks[:, SEVERITIES.index(severity) :, 3]
    shares: list[float] = flagged.mean((0, 1)).tolist()
    return shares


def won_back(of: Seen, points: float) -> tuple[list[str], list[str]]:
    """Return after which shifts adaptation wins back less than half, and after which it does not.

    A shift whose highest severity does not take more than these points is in neither.
    """
    little: list[str] = []
    much: list[str] = []
    clean = of.clean[0]
    for name, (worst, adapted, *_) in zip(of.names, of.looks[:, -1], strict=True):
        if difference(worst, clean).high < -points:
            half_way = (worst + clean) / 2
            (little if difference(adapted, half_way).high < 0 else much).append(name)
    return little, much
