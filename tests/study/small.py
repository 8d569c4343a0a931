"""What the tests of the study share: small data, a small plan, made-up outcomes and tasks."""

import os
from dataclasses import dataclass, field

import numpy as np

from batchnorm.study.data import DataSet, load
from batchnorm.study.plan import Plan, Size
from batchnorm.study.tasks import Outcome, Task, fingerprint
from batchnorm.study.training import Result, Run


def small_data(name="small"):
    """A part of the digits: two batches of 60, and 50 examples to try."""
    whole = load("digits")
    train = whole.train_inputs[:120], whole.train_labels[:120]
    return DataSet(name, *train, whole.test_inputs[:50], whole.test_labels[:50], 10)


def small_plan(data_set, seeds=(0, 1)):
    sizes = {
        "sigmoid": Size(8, (0.1, 1.0), usual_rate=1.0),
        "conv": Size(4, (0.1, 1.0), usual_rate=0.1),
    }
    return Plan(fingerprint(data_set), 0.1, sizes, seeds, repeats=2)


def plan_of(*rates, steps=100, seeds=(0, 1, 2)):
    """A plan for made-up outcomes, of one network."""
    return Plan("made up", 0.1, {"conv": Size(steps, rates, rates[0])}, seeds, repeats=3)


def result(accuracies, reason=""):
    """A result with one accuracy a step."""
    steps = list(range(1, len(accuracies) + 1))
    losses = [1.0 / step for step in steps]
    return Result(losses=losses, steps=steps, accuracies=list(accuracies), reason=reason)


def rising(step, steps=100, high=0.9):
    """Accuracies that jump from chance to high at a step, and stay there."""
    return np.where(np.arange(1, steps + 1) >= step, high, 0.1).tolist()


def many_runs():
    """More runs than are done before a test can stop them."""
    return [Run("small", "sigmoid", "plain", 1.0, seed, steps=100) for seed in range(24)]


@dataclass(frozen=True, kw_only=True)
class Note(Outcome):
    """Which process did it."""

    process: int = 0
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Errand(Task[Note]):
    """A task that does what its name says."""

    kind = "errand"
    outcome = Note

    what: str

    def perform(self, data_set):
        if self.what == "fail":
            raise RuntimeError("as it was told")
        if self.what == "die":
            os._exit(1)
        return Note(process=os.getpid())

    def __str__(self):
        return self.what


class Lonely(Errand):
    """The same, but only when nothing else is done."""

    kind = "lonely errand"
    alone = True
