"""A few learning rates for each variant of a network, and the one that suits a variant best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchnorm.study.measures.runs import final
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_COUNT = 3


def few_rates(plan: Plan, network: str) -> list[float]:
    """Return a network's usual rate and the next higher ones: most variants are best with these.

    Example:
        >>> from batchnorm.study.data import load
        >>> from batchnorm.study.plan import plan
        >>> few_rates(plan(load("digits")), "sigmoid")
        [1, 3.0, 10.0]
    """
    of = plan.networks[network]
    return sorted({of.usual_rate, *(rate for rate in of.rates if rate > of.usual_rate)})[:_COUNT]


def tried(plan: Plan, network: str, recipe: Recipe, examples: int = 0) -> list[list[Run]]:
    """Return for each of the few rates the runs that differ by the seed alone."""
    rates = few_rates(plan, network)
    return [plan.runs(network, recipe, rate, examples=examples) for rate in rates]


def at_own_rate(store: Store, by_rate: Sequence[Sequence[Run]]) -> Sequence[Run]:
    """Return the runs of the rate that ends with the highest accuracy, on the mean over the seeds.

    Args:
        store: Where the results are.
        by_rate: The runs with each rate.
    """
    return max(by_rate, key=lambda runs: float(np.mean([final(store[run]) for run in runs])))
