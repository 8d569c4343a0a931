"""What several claims measure on a run, on the runs that differ by the seed alone, and draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from batchnorm.study.plan import Plan
from batchnorm.study.recipes import Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Result, Run

LEAST, MOST = 1e-9, 1e9  # what a distance is held between
_LEARNED = 0.1  # of the way from chance to perfect: less is not told from noise


class NotMeasured(Exception):
    """A part of a claim cannot be measured; the message says why, as a sentence."""


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


def best_rate(plan: Plan, store: Store, network: str, recipe: Recipe) -> float:
    """Return the learning rate whose runs are best, on the mean over the seeds."""

    def mean(rate: float) -> float:
        return float(np.mean([best(store[run]) for run in plan.runs(network, recipe, rate)]))

    return max(plan.networks[network].rates, key=mean)


def whole(store: Store, runs: Sequence[Run]) -> list[Result]:
    """Return the results of runs.

    Raises:
        NotMeasured: One of them broke off.
    """
    results = [store[run] for run in runs]
    for run, result in zip(runs, results, strict=True):
        if result.reason:
            raise NotMeasured(f"A run broke off ({run}): {result.reason}.")
    return results


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
