"""How long an epoch takes with each norm: measured side by side, and only what agrees."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor, nn

from batchnorm.study.data import DataSet
from batchnorm.study.networks import NORMS, build
from batchnorm.study.tasks import Outcome, Task
from batchnorm.study.training import batches, one_thread, step

_LONGEST = 50  # batches that are timed at a time, and counted up to an epoch
_TOLERANCE = 1e-3  # of a float32 loss over one epoch; training lets rounding grow from step to step


@dataclass(frozen=True, kw_only=True)
class Times(Outcome):
    """What came of a timing.

    Attributes:
        seconds: For each norm, the time of an epoch, once for every repetition.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing(Task[Times]):
    """The time of an epoch of training, with each norm.

    Attributes:
        network: One of `NETWORKS`.
        learning_rate: One with which all norms train.
        repeats: How often each norm is timed.
        batch_size: Examples in a step.
    """

    kind = "timing"
    outcome = Times
    alone = True

    network: str
    learning_rate: float
    repeats: int
    batch_size: int = 60

    def perform(self, data_set: DataSet) -> Times:
        """Take the times."""
        return measure(self, data_set)

    def __str__(self) -> str:
        return f"time of an epoch, {self.network}"


def measure(timing: Timing, data_set: DataSet) -> Times:
    """Time training with each norm: on one thread, the norms in turn, on the same batches.

    The first pass is not timed: it warms up, and it checks that `torch.nn` and ours give the same
    losses. The order of the norms turns from one repetition to the next.

    Args:
        timing: What is timed.
        data_set: What the networks train on.

    Returns:
        The times.

    Raises:
        ArithmeticError: The losses differ, so the times would not be of the same computation.
    """
    in_epoch = max(1, len(data_set.train_labels) // timing.batch_size)
    timed = min(in_epoch, _LONGEST)
    data = list(islice(batches(data_set, timing.batch_size, seed=0), timed))
    models = {
        norm: build(timing.network, norm, data_set.shape, data_set.classes, seed=0)
        for norm in NORMS
    }
    seconds: dict[str, list[float]] = {norm: [] for norm in NORMS}
    with one_thread():
        losses = {norm: _pass(models[norm], data, timing.learning_rate) for norm in NORMS}
        _check(losses["torch"], losses["batchnorm"])
        for repeat in range(timing.repeats):
            turn = repeat % len(NORMS)
            for norm in NORMS[turn:] + NORMS[:turn]:
                start = time.perf_counter()
                _pass(models[norm], data, timing.learning_rate)
                seconds[norm].append((time.perf_counter() - start) * in_epoch / timed)
    return Times(seconds=seconds)


def _pass(model: nn.Module, data: list[tuple[Tensor, Tensor]], learning_rate: float) -> list[float]:
    return [step(model, x, y, learning_rate) for x, y in data]


def _check(theirs: list[float], ours: list[float]) -> None:
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True), start=1):
        if not abs(a - b) <= _TOLERANCE * max(1.0, abs(a)):
            raise ArithmeticError(f"torch.nn has the loss {a} at step {number}, batchnorm has {b}")
