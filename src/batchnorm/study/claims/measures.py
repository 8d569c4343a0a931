"""What several claims measure on a run, and on the runs that differ by the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchnorm.study.charts import Series
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.training import Result

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


def best_rate(plan: Plan, store: Store, network: str, norm: str) -> float:
    """Return the learning rate whose runs are best, on the mean over the seeds."""

    def mean(rate: float) -> float:
        return float(np.mean([best(store[run]) for run in plan.runs(network, norm, rate)]))

    return max(plan.sizes[network].rates, key=mean)


def curve(norm: str, x: Sequence[float], runs: Sequence[Sequence[float]]) -> Series:
    """Return the median of several runs' values, in a band from the lowest to the highest.

    Runs that broke off end the curve: no value in it is from fewer runs than the others.
    """
    values = np.array(list(zip(*runs, strict=False))).reshape(-1, len(runs))
    low, middle, high = np.quantile(values, [0, 0.5, 1], axis=1).tolist()
    return Series(norm, x[: len(values)], middle, low, high)
