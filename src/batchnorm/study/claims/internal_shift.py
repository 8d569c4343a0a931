"""Claim 7: batch normalization reduces internal covariate shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple, TypeAlias

import numpy as np

from batchnorm.study.charts import Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference, ratio, short
from batchnorm.study.measures.drawing import coming, coming_axis, curve, ends, reaching
from batchnorm.study.measures.internal_shift import (
    UNITS,
    distribution_shift,
    gradient_shift,
    kept,
    moved,
    moved_before,
    turned,
    wandered,
)
from batchnorm.study.measures.phases import LEARNING, before, learning
from batchnorm.study.measures.runs import each, geometric
from batchnorm.study.observation import Probe, Result
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_RECIPES = (PLAIN, NORMALIZED)

_Looks: TypeAlias = Callable[[Result, Plan, Probe, Sequence[float]], list[float]]


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs without and with normalization."""
    return [run for recipe in _RECIPES for run in _runs(plan, part, recipe)]


def _runs(plan: Plan, part: str, recipe: Recipe) -> list[Run]:
    return plan.runs(part, recipe, probes=(distribution_shift, gradient_shift))


class _Measure(NamedTuple):
    """What is seen at each look, and how the looks are averaged."""

    name: str
    probe: Probe
    values: Callable[[Result], list[float]]
    mean: Callable[[Sequence[float]], float] = geometric


_MEASURES = (
    _Measure("Hellinger distance of a step", distribution_shift, moved),
    _Measure("the same of maps' outputs", distribution_shift, moved_before),
    _Measure("change of the gradients, share", gradient_shift, turned),
    _Measure("cosine of the gradients", gradient_shift, kept, fmean),
)


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare by how much distributions and gradients shift."""
    runs = {str(recipe.norm): _runs(plan, part, recipe) for recipe in _RECIPES}
    effects, rows = [], []
    for of in _MEASURES:
        for when, looks in (("before it learns", before), ("learning", learning)):

            def average(result: Result, of: _Measure = of, looks: _Looks = looks) -> float:
                return of.mean(looks(result, plan, of.probe, of.values(result)))

            values = {norm: each(store, some, average) for norm, some in runs.items()}
            compare = difference if of.values is kept else ratio
            effect = compare(values["batchnorm"], values["plain"])
            rows += [
                Row(f"{norm}, {when}", of.name, values[norm], effect if norm != "plain" else None)
                for norm in runs
            ]
        effects.append((values, effect))
    (steps, by_step), (_, by_output), (_, by_gradient), _ = effects
    wanders = {norm: each(store, some, wandered) for norm, some in runs.items()}
    by_range = ratio(wanders["batchnorm"], wanders["plain"])
    rows += [
        Row(norm, "range of percentiles, in spreads", wanders[norm], effect)
        for norm, effect in (("plain", None), ("batchnorm", by_range))
    ]
    return Finding(
        part,
        f"Once it learns, a step moves what the activations of the {part} network get {by_step} as "
        f"far with batch normalization as without it, and what the linear maps put out {by_output} "
        f"as far. Over the training the percentiles of the last hidden layer range {by_range} as "
        "far. The gradient of a layer's weights, by the step of the layers before it, changes "
        f"{by_gradient} as much.",
        str(by_step),
        short(geometric(steps["plain"])),
        short(geometric(steps["batchnorm"])),
        {
            "a step moves the distributions less": by_step.high < 1,
            "the outputs of the linear maps move less, too": by_output.high < 1,
            "the percentiles range less over the training": by_range.high < 1,
            "the layers before change the gradients less": by_gradient.high < 1,
        },
        rows,
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
        coming_axis(plan, part),
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
    return Panel(f"{part}, {what}", coming_axis(plan, part), axis, lines)


CLAIM = Claim(
    number=7,
    name="internal_shift",
    title="Less internal covariate shift",
    says="While a network learns, the layers before each layer change what it gets, and it must "
    "follow; batch normalization holds the mean and the variance of each unit, so that it gets "
    "much the same. Directly behind it that is so nearly by construction: these moments are beta "
    "and gamma. What the maps put out, before normalization, is what may still move. Santurkar et "
    "al. (2018, arXiv:1805.11604) found no link between this and the gain: networks with noise "
    "that shifts the distributions behind batch normalization train as well, and by their own "
    "definition, the change of a layer's gradient when the layers before it have taken their step, "
    "batch normalization reduces the shift little or even adds to it.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), sections 1, 2 and 4.1; figure 1",
    measured="Both networks train with the network's usual rate, on batches of 60. At "
    "steps whose numbers grow by a factor of 1.5, from the first to the last, we look "
    "in the training mode. (a) What each hidden activation gets, on the same 500 held-out examples "
    "at the most, before one step on the next batch and after it: between the normal "
    "distributions with a channel's means and variances we take the Hellinger distance, which "
    "reaches from 0 to 1, sees mean and variance alike, and does not depend on the scale; "
    "then the mean over the channels and over the layers, and the geometric mean over the looks. "
    "Directly behind batch normalization these moments are beta and gamma, by construction, so the "
    "same is taken of what each linear map but the last puts out, before any normalization. "
    f"(b) The {{15, 50, 85}}th percentiles of the first {UNITS} units of the last hidden layer: "
    "how far each ranges from its lowest to its highest over all looks, as a multiple of the "
    "unit's mean distance from the 15th to the 85th; the mean of the three, the median over the "
    "units. (c) The gradient of each map's weights but the first one's, on the same batch, before "
    "and after all parameters in front of it have taken their step: the length of the "
    "change as a share of the gradient before, averaged like (a), and the cosine between both. A "
    "network that hardly learns yet takes short steps, and shifts little by them: plain sigmoids "
    "do so for hundreds of steps. So (a) and (c) are averaged apart over the looks before and "
    f"after the loss of a batch first falls below {LEARNING:.0%} of the first one, and of the loss "
    "of guessing, for each run by itself.",
    rule="It holds for a network if the 95% intervals of four ratios to the plain network, over "
    "the seeds, are below\u00a01: the two distances of (a), the range of (b), the change of (c); "
    "of (a) and (c) the looks after learning began count.",
    unit="distance moved in a step",
    parts=("sigmoid", "conv", "relu", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
