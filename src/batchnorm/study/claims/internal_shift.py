"""Claim 7: batch normalization reduces internal covariate shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from batchnorm.study.charts import Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference, ratio, short
from batchnorm.study.measures.drawing import coming, curve, ends, reaching, step_axis
from batchnorm.study.measures.internal_shift import (
    UNITS,
    distribution_shift,
    gradient_shift,
    kept,
    moved,
    turned,
    wandered,
)
from batchnorm.study.measures.runs import each, geometric
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Probe, Result, Run

_RECIPES = (PLAIN, NORMALIZED)


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs without and with normalization."""
    return [run for recipe in _RECIPES for run in _runs(plan, part, recipe)]


def _runs(plan: Plan, part: str, recipe: Recipe) -> list[Run]:
    return plan.runs(part, recipe, probes=(distribution_shift, gradient_shift))


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare by how much distributions and gradients shift."""
    runs = {recipe.norm: _runs(plan, part, recipe) for recipe in _RECIPES}
    steps, ranges, gradients, cosines = (
        {norm: each(store, of, quantity) for norm, of in runs.items()}
        for quantity in (
            lambda r: geometric(moved(r)),
            wandered,
            lambda r: geometric(turned(r)),
            kept,
        )
    )
    by_step, by_range, by_gradient = (
        ratio(of["batchnorm"], of["plain"]) for of in (steps, ranges, gradients)
    )
    by_cosine = difference(cosines["batchnorm"], cosines["plain"])
    table = [
        ("Hellinger distance of a step", steps, by_step),
        ("range of percentiles, in spreads", ranges, by_range),
        ("change of the gradients, share", gradients, by_gradient),
        ("cosine of the gradients", cosines, by_cosine),
    ]
    return Finding(
        part,
        f"A step moves the hidden distributions of the {part} network {by_step} as far with batch "
        f"normalization as without it, and over the training the percentiles of the last hidden "
        f"layer range {by_range} as far. The gradient of a layer's weights, by the step of the "
        f"layers before it, changes {by_gradient} as much.",
        str(by_step),
        short(geometric(steps["plain"])),
        short(geometric(steps["batchnorm"])),
        {
            "a step moves the distributions less": by_step.high < 1,
            "the percentiles range less over the training": by_range.high < 1,
            "the layers before change the gradients less": by_gradient.high < 1,
        },
        [
            Row(norm, what, values[norm], effect if norm == "batchnorm" else None)
            for what, values, effect in table
            for norm in runs
        ],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw a unit's percentiles, and the shift of each step that was looked at."""
    return [
        Chart(
            "percentiles",
            "The {15, 50, 85}th percentiles, over held-out examples, of what the first unit or "
            "channel of the last hidden layer hands to its activation: one run of each network.",
            [_percentiles(plan, part, store) for part in parts],
        ),
        Chart(
            "internal-shift",
            "How far one step moves the hidden distributions, and how much it changes a layer's "
            "gradient by what it does to the layers before. Lines are medians over the seeds, "
            "bands reach from the lowest to the highest.",
            [
                panel
                for part in parts
                for panel in (
                    _shifts(plan, part, store, "distributions", distribution_shift, moved),
                    _shifts(plan, part, store, "gradients", gradient_shift, turned),
                )
            ],
        ),
    ]


def _percentiles(plan: Plan, part: str, store: Store) -> Panel:
    lines = []
    for recipe in _RECIPES:
        result = store[_runs(plan, part, recipe)[0]]
        seen = np.array([seen["percentiles"][0] for seen in result.seen(distribution_shift)])
        low, middle, high = seen.T.tolist()
        lines.append(Series(recipe.norm, coming(result, distribution_shift), middle, low, high))
    return Panel(
        f"{part}, rate {plan.networks[part].usual_rate:g}",
        step_axis(plan, part),
        reaching("input of the activation", ends(lines)),
        lines,
    )


def _shifts(
    plan: Plan,
    part: str,
    store: Store,
    what: str,
    probe: Probe,
    quantity: Callable[[Result], list[float]],
) -> Panel:
    results = {
        recipe.norm: [store[run] for run in _runs(plan, part, recipe)] for recipe in _RECIPES
    }
    lines = [
        curve(norm, coming(of[0], probe), [quantity(result) for result in of])
        for norm, of in results.items()
    ]
    axis = (
        reaching("Hellinger distance", ends(lines), log=True)
        if probe is distribution_shift
        else reaching("change, share of the gradient", ends(lines), start=0)
    )
    return Panel(f"{part}, {what}", step_axis(plan, part), axis, lines)


CLAIM = Claim(
    number=7,
    name="internal_shift",
    title="Less internal covariate shift",
    says="While a network learns, the layers before each layer change what it gets, and it must "
    "follow; batch normalization holds the mean and the variance of each unit, so that it gets "
    "much the same. Santurkar et al. (2018, arXiv:1805.11604) found no link between this and the "
    "gain: networks with noise that shifts the distributions behind batch normalization train as "
    "well, and by their own definition, the change of a layer's gradient when the layers before it "
    "have taken their step, batch normalization reduces the shift little or even adds to it.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), sections 1, 2 and 4.1; figure 1",
    measured="Both networks train with the network's usual rate, on batches of 60. At "
    "steps whose numbers grow by a factor of 1.5, from the first to the last, we look "
    "in the training mode. (a) What each hidden activation gets, on the same 500 held-out examples "
    "at the most, before one step on the next batch and after it: between the normal "
    "distributions with a channel's means and variances we take the Hellinger distance, which "
    "reaches from 0 to 1, sees mean and variance alike, and does not depend on the scale; "
    "then the mean over the channels and over the layers, and the geometric mean over the looks. "
    "Directly behind batch normalization these moments are beta and gamma, by construction. "
    f"(b) The {{15, 50, 85}}th percentiles of the first {UNITS} units of the last hidden layer: "
    "how far each ranges from its lowest to its highest over all looks, as a multiple of the "
    "unit's mean distance from the 15th to the 85th; the mean of the three, the median over the "
    "units. (c) The gradient of each map's weights but the first one's, on the same batch, before "
    "and after all parameters in front of it have taken their step: the length of the "
    "change as a share of the gradient before, averaged like (a), and the cosine between both. A "
    "network that hardly learns yet takes short steps, and shifts little by them.",
    rule="It holds for a network if the 95% intervals of three ratios to the plain network, over "
    "the seeds, are below\u00a01: the distance of (a), the range of (b), the change of (c).",
    unit="distance moved in a step",
    parts=("sigmoid", "conv", "relu", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
