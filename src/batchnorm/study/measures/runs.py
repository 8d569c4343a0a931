"""What several claims measure on a run, on the runs that differ by the seed alone, and draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from batchnorm.study.observation import Result
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.tasks import NotMeasured as NotMeasured
from batchnorm.study.tasks import Outcome, Task
from batchnorm.study.training import Run

O = TypeVar("O", bound=Outcome)

LEAST, MOST = 1e-9, 1e9  # what a distance is held between
_LEARNED = 0.1  # of the way from chance to perfect: less is not told from noise


def best(result: Result) -> float:
    """Return the highest held-out accuracy of a run."""
    return max(result.accuracies, default=0.0)


def final(result: Result) -> float:
    """Return the mean accuracy of the last three evaluations; 0 for a run that broke off."""
    if result.reason:
        return 0.0
    return float(np.mean(result.accuracies[-3:]))


def learned(accuracy: float, plan: Plan) -> bool:
    """Tell whether a network learned anything."""
    return accuracy >= plan.chance + _LEARNED * (1 - plan.chance)


def whole(store: Store, tasks: Sequence[Task[O]]) -> list[O]:
    """Return the outcomes of runs, or of other tasks.

    Raises:
        NotMeasured: One of them broke off.
    """
    outcomes = [store[task] for task in tasks]
    for task, outcome in zip(tasks, outcomes, strict=True):
        if outcome.reason:
            raise NotMeasured(f"A run broke off ({task}): {outcome.reason}.")
    return outcomes


def each(store: Store, runs: Sequence[Run], quantity: Callable[[Result], float]) -> list[float]:
    """Return a quantity of each of the runs, all of which must be whole.

    Raises:
        NotMeasured: One of them broke off, or the quantity is not finite.
    """
    values = [quantity(result) for result in whole(store, runs)]
    if not all(map(math.isfinite, values)):
        raise NotMeasured(f"A quantity is not finite ({runs[0]}): {values}.")
    return values


def held(value: float) -> float:
    """Return a distance that has a logarithm, and that JSON can hold."""
    return min(max(value, LEAST), MOST) if value == value else MOST


def geometric(values: Sequence[float]) -> float:
    """Return the geometric mean: that of all that is compared by factors.

    Example:
        >>> round(geometric([1, 10, 100]), 6)
        10.0
    """
    return float(np.exp(np.mean(np.log(values))))
