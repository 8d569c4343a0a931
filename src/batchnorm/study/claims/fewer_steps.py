"""Claim 1: batch normalization reaches the same accuracy in fewer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import ratio
from batchnorm.study.measures.drawing import accuracies, curve, longest, steps_axis
from batchnorm.study.measures.rates import at_own_rate, told_steps
from batchnorm.study.measures.runs import NotMeasured, best, geometric, learned
from batchnorm.study.observation import Result
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_PARTS = ("sigmoid", "conv", "relu", "residual", "tanh", "elu")
_BEST = "best for plain"
_HIGHEST = 20.0  # a loss far worse than chance: more of it would flatten the rest of the curve
_RECIPES = (PLAIN, NORMALIZED)


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the grid of learning rates."""
    return plan.grid(part, _RECIPES)


def _rate(plan: Plan, part: str, store: Store) -> float:
    """The rate with which the plain network becomes most accurate."""
    by_rate = [plan.runs(part, PLAIN, rate) for rate in plan.networks[part].rates]
    return at_own_rate(store, by_rate, best)[0].learning_rate


def steps_until(result: Result, accuracy: float) -> float:
    """Return after how many steps a run first had an accuracy; infinity if it never had.

    Example:
        >>> steps_until(Result(steps=[1, 2, 4], accuracies=[0.1, 0.5, 0.4]), 0.4)
        2
    """
    pairs = zip(result.steps, result.accuracies, strict=True)
    return next((step for step, reached in pairs if reached >= accuracy), math.inf)


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Count the steps until the plain network's best accuracy."""
    rate = _rate(plan, part, store)
    goals = [best(store[run]) for run in plan.runs(part, PLAIN, rate)]
    reached = float(np.mean(goals))
    if not learned(reached, plan):
        raise NotMeasured(f"The plain {part} network learned nothing.")

    def row(norm: str, rate: float) -> Row:
        runs = plan.runs(part, PLAIN if norm == "plain" else NORMALIZED, rate)
        counts = [steps_until(store[run], goal) for run, goal in zip(runs, goals, strict=True)]
        counts = [min(count, plan.networks[part].steps) for count in counts]
        effect = ratio(plain.values, counts) if norm != "plain" else None
        return Row(norm, f"steps, rate {rate:g}", counts, effect)

    plain = row("plain", rate)
    ours = row("batchnorm", rate)
    # Where rates are equally good, that of the plain network comes first, and makes no row more.
    own = min(
        [ours, *(row("batchnorm", of) for of in plan.networks[part].rates if of != rate)],
        key=_mean,
    )
    assert ours.effect is not None
    return Finding(
        part,
        f"With the learning rate that is best for the plain {part} network, {rate:g}, it had "
        f"its best accuracy, {reached:.1%}, after {_mean(plain):.0f} steps, and the normalized one "
        f"had as much after {_mean(ours):.0f}: a factor of {ours.effect}.",
        str(ours.effect),
        f"{_mean(plain):.0f}",
        f"{_mean(ours):.0f}",
        {"fewer steps with batch normalization": ours.effect.low > 1},
        [plain, ours, *([own] if own is not ours else [])],
    )


def _mean(row: Row) -> float:
    return geometric(row.values)


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the learning curves."""
    rates = {part: _rate(plan, part, store) for part in parts}
    every = sorted({rate for part in parts for rate in plan.networks[part].rates})
    panels = [_accuracies(plan, store, part, rate, _BEST) for part, rate in rates.items()]
    panels += [
        _accuracies(plan, store, part, rate, f"{rate:g}")
        for rate in every
        for part in parts
        if rate in plan.networks[part].rates
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
            [_losses(plan, store, part, rate) for part, rate in rates.items()],
        ),
    ]


def _accuracies(plan: Plan, store: Store, part: str, rate: float, choice: str) -> Panel:
    results = {r.norm: [store[run] for run in plan.runs(part, r, rate)] for r in _RECIPES}
    goal = 100 * float(np.mean([best(result) for result in results["plain"]]))
    return Panel(
        f"{part}, rate {rate:g}",
        steps_axis(plan, part),
        Axis("held-out accuracy, %", 0, 102),
        [accuracies(norm, of) for norm, of in results.items()],
        goal=(goal, "plain's best"),
        choice=choice,
    )


def _losses(plan: Plan, store: Store, part: str, rate: float) -> Panel:
    lines = []
    for recipe in _RECIPES:
        results = [store[run] for run in plan.runs(part, recipe, rate)]
        smooth = [
            [float(np.mean(result.losses[a:b])) for a, b in pairwise([0, *result.steps])]
            for result in results
        ]
        lines.append(curve(recipe.norm, longest(results), smooth))
    lowest = min((value for line in lines for value in line.low), default=0.1)
    highest = max((value for line in lines for value in line.y), default=1.0)
    return Panel(
        f"{part}, rate {rate:g}",
        steps_axis(plan, part),
        Axis("training loss", max(lowest, 1e-4) / 1.3, min(highest, _HIGHEST) * 1.3, log=True),
        lines,
    )


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
    "network first has it, from the same initial weights, on the same batches. A run has the "
    f"network's own number of steps ({told_steps(_PARTS)}); one that never has the goal counts "
    "with all of them. So the goal is the plain network's best within these steps: where it still "
    "improves at the end, longer runs would have a higher goal, and another factor. A last row "
    "gives batch normalization the learning rate with which it needs the fewest steps, where that "
    "is another one.",
    rule="It holds for a network if the factor's 95% interval over the seeds is above\u00a01.",
    unit="steps to plain's best",
    parts=_PARTS,
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
