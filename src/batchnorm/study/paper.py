"""The first experiment of Ioffe & Szegedy (2015), section 4.1, and its figure 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims import Claim, Finding, Row
from batchnorm.study.claims.fewer_steps import steps_until
from batchnorm.study.interval import ratio
from batchnorm.study.measures.drawing import accuracies, reaching
from batchnorm.study.measures.internal_shift import PERCENTILES, last_percentiles, ranges
from batchnorm.study.measures.runs import best, each, whole
from batchnorm.study.observation import State
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

STEPS = 50_000
_RATE = 0.1
_RECIPES = (
    Recipe("plain", initialization="gaussian"),
    Recipe("batchnorm", initialization="gaussian"),
)


def last_inputs(state: State) -> list[float]:
    """Return percentiles of what comes into one unit of the last sigmoid layer, in training.

    In evaluation the first looks would see running statistics that are still near 0 and 1.
    """
    (percentiles,) = last_percentiles(state.copy(), state.held_out[0], units=1)
    return percentiles


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the two networks, from every seed."""
    return [run for runs in _runs(plan, part).values() for run in runs]


def _runs(plan: Plan, part: str) -> dict[str, list[Run]]:
    return {
        recipe.norm: plan.runs(part, recipe, _RATE, steps=STEPS, growth=1.1, probes=(last_inputs,))
        for recipe in _RECIPES
    }


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Count the steps to the plain network's best, and how far the percentiles wander."""
    runs = _runs(plan, part)
    goals = each(store, runs["plain"], best)
    reached = {
        norm: [
            min(steps_until(result, goal), STEPS)
            for result, goal in zip(whole(store, of), goals, strict=True)
        ]
        for norm, of in runs.items()
    }
    wandered = {norm: [_wandering(store, run) for run in of] for norm, of in runs.items()}
    best_of = {norm: [100 * best(store[run]) for run in of] for norm, of in runs.items()}
    sooner = ratio(reached["plain"], reached["batchnorm"])
    steadier = ratio(wandered["batchnorm"], wandered["plain"])
    accuracy = {norm: float(np.mean(of)) for norm, of in best_of.items()}
    return Finding(
        part,
        f"The plain network had its best accuracy, {accuracy['plain']:.1f}%, after "
        f"{np.median(reached['plain']):.0f} steps, and the normalized one, whose best is "
        f"{accuracy['batchnorm']:.1f}%, had as much after {np.median(reached['batchnorm']):.0f}: "
        f"a factor of {sooner}. Over the training, the percentiles of a last hidden unit's input "
        f"wandered {steadier} as far with batch normalization as without.",
        str(sooner),
        f"{np.median(reached['plain']):.0f}",
        f"{np.median(reached['batchnorm']):.0f}",
        {
            "fewer steps with batch normalization": sooner.low > 1,
            "steadier inputs with batch normalization": steadier.high < 1,
        },
        [
            Row("plain", "steps to plain's best", reached["plain"]),
            Row("batchnorm", "steps to plain's best", reached["batchnorm"], sooner),
            Row("plain", "best accuracy, %", best_of["plain"]),
            Row("batchnorm", "best accuracy, %", best_of["batchnorm"]),
            Row("plain", "wandering of the percentiles", wandered["plain"]),
            Row("batchnorm", "wandering of the percentiles", wandered["batchnorm"], steadier),
        ],
    )


def _wandering(store: Store, run: Run) -> float:
    """The range of each percentile over the training, in units of their mean spread."""
    return ranges([[seen] for seen in store[run].seen(last_inputs)])


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw figure 1: (a) the accuracy, (b) and (c) the percentiles."""
    return [
        Chart(
            "figure-1",
            "Figure 1 of the paper. Accuracy on held-out examples while the networks learn: "
            "medians over the seeds, in bands from the lowest to the highest. Then the "
            "{15, 50, 85}th percentiles of what comes into one unit of the last sigmoid layer, "
            "over the training, from one seed, without and with batch normalization, "
            "in training mode.",
            [panel for part in parts for panel in _panels(plan, part, store)],
        )
    ]


def _panels(plan: Plan, part: str, store: Store) -> list[Panel]:
    runs = _runs(plan, part)
    ticks = [(step, f"{step // 1000}K") for step in range(0, STEPS + 1, 10_000)]
    steps = Axis("steps", 0, STEPS, ticks=ticks)
    learning = [accuracies(norm, [store[run] for run in of]) for norm, of in runs.items()]
    reached = reaching("held-out accuracy, %", [line.y for line in learning])
    panels = [Panel("(a) accuracy", steps, reached, learning)]
    for letter, (norm, of) in zip("bc", runs.items(), strict=True):
        result = store[of[0]]
        seen = np.array(result.seen(last_inputs)).T.tolist()
        lines = [
            Series(norm, result.at(last_inputs), values, name=f"{percent}%")
            for percent, values in zip(PERCENTILES, seen, strict=True)
        ]
        axis = reaching("input of the sigmoid", seen)
        panels.append(Panel(f"({letter}) {norm}", steps, axis, lines))
    return panels


CLAIM = Claim(
    number=0,
    name="paper",
    title="Figure 1 of the original paper",
    says="With batch normalization the network trains faster, reaches a higher accuracy, and the "
    "distribution of what comes into a typical sigmoid stays steadier over the training.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 4.1, figure 1",
    measured="The network of the paper: three dense layers of 100 sigmoids, weights drawn from a "
    f"small Gaussian (standard deviation 0.1), {STEPS:,} steps of gradient descent on batches of "
    f"60. The paper does not give the learning rate: it is {_RATE:g} here, for both networks. "
    "Accuracy is that on held-out examples. The percentiles are those of the input of the first "
    "unit of the last sigmoid layer, over the held-out examples, in training mode: normalized by "
    "their own moments, as in evaluation the first looks would see running averages that are still "
    "near the 0 and 1 that they start from. Their wandering is the range of each over the "
    "training, as a multiple of the mean distance from the 15th to the 85th.",
    rule="It holds if the 95% interval over the seeds of the factor in steps to the plain "
    "network's best is above\u00a01, and that of the factor in wandering below\u00a01.",
    unit="steps to plain's best",
    parts=("sigmoid",),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
