"""Claim 1: batch normalization reaches the same accuracy in fewer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from batchnorm.study.charts import STYLES, Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding
from batchnorm.study.claims.measures import best, best_rate, curve, learned
from batchnorm.study.interval import ratio
from batchnorm.study.networks import NORMS
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.training import Result

_BEST = "best for plain"
_HIGHEST = 20.0  # a loss far worse than chance: more of it would flatten the rest of the curve


def measure(plan: Plan, store: Store) -> list[Finding]:
    """Count the steps until the plain network's best accuracy."""
    return [_with(network, plan, store) for network in plan.sizes]


def steps_until(result: Result, accuracy: float) -> float:
    """Return after how many steps a run first had an accuracy; infinity if it never had.

    Example:
        >>> steps_until(Result(steps=[1, 2, 4], accuracies=[0.1, 0.5, 0.4]), 0.4)
        2
    """
    pairs = zip(result.steps, result.accuracies, strict=True)
    return next((step for step, reached in pairs if reached >= accuracy), math.inf)


def _with(network: str, plan: Plan, store: Store) -> Finding:
    rate = best_rate(plan, store, network, "plain")
    goals = [best(store[run]) for run in plan.runs(network, "plain", rate)]
    reached = float(np.mean(goals))
    if not learned(reached, plan):
        return Finding(network, f"The plain {network} network learned nothing.", "no goal")

    def steps(norm: str, rate: float) -> list[float]:
        runs = plan.runs(network, norm, rate)
        counts = [steps_until(store[run], goal) for run, goal in zip(runs, goals, strict=True)]
        return [min(count, plan.sizes[network].steps) for count in counts]

    plain = steps("plain", rate)
    ours = ratio(plain, steps("batchnorm", rate))
    cells = {norm: f"{_mean(steps(norm, rate)):.0f}" for norm in NORMS}
    fastest = min(plan.sizes[network].rates, key=lambda rate: _mean(steps("batchnorm", rate)))
    details = [
        (
            network,
            STYLES[norm].name,
            f"{of:g}",
            ", ".join(f"{count:.0f}" for count in steps(norm, of)),
            "" if norm == "plain" else str(ratio(plain, steps(norm, of))),
        )
        for norm, of in [*((norm, rate) for norm in NORMS), ("batchnorm", fastest)]
    ]
    return Finding(
        network,
        f"With the learning rate that is best for the plain {network} network, {rate:g}, it had "
        f"its best accuracy, {reached:.1%}, after {cells['plain']} steps, and the normalized one "
        f"had as much after {cells['batchnorm']}: a factor of {ours}.",
        str(ours),
        cells,
        [ours.low > 1],
        details,
    )


def _mean(counts: Sequence[float]) -> float:
    """The geometric mean, as of all that grows by factors."""
    return float(np.exp(np.mean(np.log(counts))))


def charts(plan: Plan, store: Store) -> list[Chart]:
    """Draw the learning curves."""
    rates = {network: best_rate(plan, store, network, "plain") for network in plan.sizes}
    every = sorted({rate for size in plan.sizes.values() for rate in size.rates})
    panels = [_accuracies(plan, store, network, rate, _BEST) for network, rate in rates.items()]
    panels += [
        _accuracies(plan, store, network, rate, f"{rate:g}")
        for rate in every
        for network, size in plan.sizes.items()
        if rate in size.rates
    ]
    return [
        Chart(
            "learning-curves",
            "Accuracy on held-out examples while the networks learn. Lines are medians over the "
            "seeds, bands reach from the lowest to the highest. The dotted line is the plain "
            "network's best.",
            panels,
            "Learning rate",
            _BEST,
        ),
        Chart(
            "loss-curves",
            "Training loss with the learning rate that is best for the plain network, averaged "
            "over the steps from one point to the next.",
            [_losses(plan, store, network, rate) for network, rate in rates.items()],
        ),
    ]


def _accuracies(plan: Plan, store: Store, network: str, rate: float, choice: str) -> Panel:
    results = {norm: [store[run] for run in plan.runs(network, norm, rate)] for norm in NORMS}
    goal = 100 * float(np.mean([best(result) for result in results["plain"]]))
    return Panel(
        f"{network}, rate {rate:g}",
        _steps_axis(plan, network),
        Axis("held-out accuracy, %", 0, 102),
        [
            curve(norm, of[0].steps, [[100 * a for a in result.accuracies] for result in of])
            for norm, of in results.items()
        ],
        goal=(goal, "plain's best"),
        choice=choice,
    )


def _losses(plan: Plan, store: Store, network: str, rate: float) -> Panel:
    lines = []
    for norm in NORMS:
        results = [store[run] for run in plan.runs(network, norm, rate)]
        smooth = [
            [float(np.mean(result.losses[a:b])) for a, b in pairwise([0, *result.steps])]
            for result in results
        ]
        lines.append(curve(norm, results[0].steps, smooth))
    lowest = min((value for line in lines for value in line.low), default=0.1)
    highest = max((value for line in lines for value in line.y), default=1.0)
    return Panel(
        f"{network}, rate {rate:g}",
        _steps_axis(plan, network),
        Axis("training loss", max(lowest, 1e-4) / 1.3, min(highest, _HIGHEST) * 1.3, log=True),
        lines,
    )


def _steps_axis(plan: Plan, network: str) -> Axis:
    return Axis("steps", 1, plan.sizes[network].steps, log=True)


CLAIM = Claim(
    number=1,
    name="fewer_steps",
    title="The same accuracy in fewer steps",
    says="A network with batch normalization reaches the accuracy of one without it in fewer "
    "epochs. In the original paper an image classifier needed 14 times fewer steps, with a "
    "learning rate raised as well.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), sections 1, 4.1 and 4.2.2",
    measured="The plain network is trained with every learning rate of a grid, and the rate "
    "with which it becomes most accurate is kept: the choice favours the plain network. For "
    "each seed, its best held-out accuracy is the goal, and we count the steps until each "
    "network first has it, from the same initial weights, on the same batches. A run that never "
    "has it counts with all its steps. The last line of the numbers gives batch normalization "
    "the learning rate of its own choice.",
    rule="It holds for a network if the factor's 95% interval over the seeds is above\u00a01.",
    unit="steps to plain's best",
    headings=("network", "norm", "rate", "steps, seed by seed", "fewer, by"),
    tasks=Plan.grid,
    measure=measure,
    charts=charts,
)
