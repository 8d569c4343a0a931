"""How long training and inference take with each norm: side by side, and only what agrees."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from batchnorm.models import fold
from batchnorm.study.data import DataSet
from batchnorm.study.descent import batches, one_thread, step
from batchnorm.study.networks import Network, build
from batchnorm.study.recipes import PLAIN, TORCH, Recipe
from batchnorm.study.tasks import Outcome, Task

_LONGEST = 50  # batches that are timed at a time, and counted up to an epoch
_TOLERANCE = 1e-3  # of a float32 loss over one epoch; training lets rounding grow from step to step
_RECIPES = {"plain": PLAIN, "torch": TORCH, "batchnorm": Recipe("batchnorm", fused=True)}


@dataclass(frozen=True, kw_only=True)
class Times(Outcome):
    """What came of a timing.

    Attributes:
        training: For each norm, the time of an epoch of training, once for every repetition.
        inference: The same of predicting the same examples; `folded` has batch normalization's
            weights multiplied into the linear maps before it.
    """

    training: Mapping[str, list[float]] = field(default_factory=dict)
    inference: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing(Task[Times]):
    """The time of an epoch, with each norm.

    Attributes:
        network: The network.
        repeats: How often each norm is timed.
        batch_size: Examples in a step.
    """

    kind = "timing"
    outcome = Times
    alone = True

    network: Network
    repeats: int
    batch_size: int = 60

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes."""
        return paces[self.network.name] * 30 * (self.repeats + 1) * 3.2

    def perform(self, data_set: DataSet) -> Times:
        """Take the times."""
        return measure(self, data_set)

    def __str__(self) -> str:
        return f"time of an epoch, {self.network.name}"


def measure(timing: Timing, data_set: DataSet) -> Times:
    """Time training and inference: on one thread, the norms in turn, on the same batches.

    The first pass is not timed: it warms up, and it checks that `torch.nn` and ours give the same
    losses, and the folded network the same predictions. The order of the norms turns from one
    repetition to the next.

    Args:
        timing: What is timed.
        data_set: What the networks train on.

    Returns:
        The times.

    Raises:
        ArithmeticError: The results differ, so the times would not be of the same computation.
    """
    in_epoch = max(1, len(data_set.train_labels) // timing.batch_size)
    timed = min(in_epoch, _LONGEST)
    data = list(islice(batches(data_set, timing.batch_size, seed=0), timed))
    shape, classes = data_set.shape, data_set.classes
    models: dict[str, nn.Module] = {
        norm: build(timing.network, recipe, shape, classes, seed=0)
        for norm, recipe in _RECIPES.items()
    }
    rate = timing.network.usual_rate

    def training(norm: str) -> list[float]:
        return [step(models[norm], x, y, rate) for x, y in data]

    def inference(norm: str) -> list[Tensor]:
        return [models[norm](x) for x, _ in data]

    with one_thread():
        losses = {norm: training(norm) for norm in models}
        _check(losses["torch"], losses["batchnorm"])
        for model in models.values():
            model.train()
        seconds = _in_turn(training, list(models), timing.repeats, in_epoch / timed)
        with torch.no_grad():
            for model in models.values():
                model.eval()
            models["folded"], _ = fold(models["torch"], data[0][0])
            _check_folded(inference("torch"), inference("folded"))
            passed = _in_turn(inference, list(models), timing.repeats, in_epoch / timed)
    return Times(training=seconds, inference=passed)


def _in_turn(
    call: Callable[[str], object], names: list[str], repeats: int, factor: float
) -> dict[str, list[float]]:
    """Time a call for each name, in an order that turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            call(name)
            seconds[name].append((time.perf_counter() - start) * factor)
    return seconds


def _check(theirs: list[float], ours: list[float]) -> None:
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True), start=1):
        if not abs(a - b) <= _TOLERANCE * max(1.0, abs(a)):
            raise ArithmeticError(f"torch.nn has the loss {a} at step {number}, batchnorm has {b}")


def _check_folded(whole: list[Tensor], merged: list[Tensor]) -> None:
    for a, b in zip(whole, merged, strict=True):
        worst = float((a - b).abs().max() / a.abs().max().clamp_min(1))
        if not worst <= _TOLERANCE:
            raise ArithmeticError(f"folding changes a prediction by {worst:.1e}")
