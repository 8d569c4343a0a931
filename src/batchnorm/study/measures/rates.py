"""How claims train a network: for how many steps, with which rates, and with which one best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from batchnorm.study.measures.runs import final
from batchnorm.study.networks import NETWORKS
from batchnorm.study.observation import Result
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
        [1.0, 3.0, 10.0]
    """
    of = plan.networks[network]
    return sorted({of.usual_rate, *(rate for rate in of.rates if rate > of.usual_rate)})[:_COUNT]


def tried(plan: Plan, network: str, recipe: Recipe, examples: int = 0) -> list[list[Run]]:
    """Return for each of the few rates the runs that differ by the seed alone."""
    rates = few_rates(plan, network)
    return [plan.runs(network, recipe, rate, examples=examples) for rate in rates]


def at_own_rate(
    store: Store,
    by_rate: Sequence[Sequence[Run]],
    quantity: Callable[[Result], float] = final,
) -> Sequence[Run]:
    """Return the runs of the rate that is best, on the mean over the seeds.

    Args:
        store: Where the results are.
        by_rate: The runs with each rate.
        quantity: What is highest with the best rate: by default the accuracy at the end.
    """
    return max(by_rate, key=lambda runs: float(np.mean([quantity(store[run]) for run in runs])))


def told_steps(networks: Sequence[str], share: int = 1) -> str:
    """Write how many steps a run of each network has, or a share of them.

    Example:
        >>> told_steps(["sigmoid", "conv"], share=2)
        'sigmoid 450, conv 100'
    """
    return ", ".join(f"{name} {NETWORKS[name].steps // share}" for name in networks)
