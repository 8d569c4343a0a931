"""Claim 13: a change of scale in one layer needs no adjustment in the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study.charts import Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference, short
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.examples import (
    TOLERANCE,
    WorkedExamples,
    furthest_from_limit,
    limit_panel,
    limit_rows,
    worked,
)
from batchnorm.study.measures.runs import NotMeasured, learned, whole
from batchnorm.study.networks import maps, norms
from batchnorm.study.observation import State
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN
from batchnorm.study.store import Store
from batchnorm.study.tasks import Task

_FACTOR = 100.0
_FLOOR = 1e-8  # where no change is drawn, as a logarithm has no 0
_DRAWN = ("outputs", "predictions")
_LITTLE = 0.01  # of the outputs: what rounding and eps may change
_EXAMPLE = "worked example"  # the part that needs no network
_BATCH, _OLD = "batch's moments", "old running moments"
_MEASURES = (
    "relative change of the outputs",
    "predictions that change, %",
    "accuracy before, %",
    "accuracy after, %",
)
_CONDITIONS = {
    "plain": ("plain", "running"),
    _BATCH: ("batchnorm", "batch"),
    _OLD: ("batchnorm", "running"),
    "calibrated": ("batchnorm", "calibrated"),
}


def scaled_predictions(state: State) -> dict[str, list[float]] | None:
    """Return what it does to a network at the end of its run to scale its first layer by 100.

    Returns:
        By the moments that normalize: how much the outputs change, relatively, and in percent,
        how many predictions change, and the accuracy before and after.
    """
    if not state.last:
        return None
    before, after = state.copy(), state.copy()
    first = maps(after)[0]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(_FACTOR)
    # In this order, as a call with the batch's moments moves the running ones.
    found = {"running": _compared(before.eval(), after.eval(), state)}
    found["batch"] = _compared(before.train(), after.train(), state)
    for model in filter(norms, (before, after)):
        bn.calibrate(model, [state.trained[0]], progress=False)
    found["calibrated"] = _compared(before.eval(), after.eval(), state)
    return found


def _compared(before: nn.Module, after: nn.Module, state: State) -> list[float]:
    x, y = state.held_out
    with torch.no_grad():
        # What all outputs of an example have in common makes no difference to what is predicted.
        old, new = (z - z.mean(1, keepdim=True) for z in (before(x).double(), after(x).double()))
    change = float(((new - old).norm() / old.norm().clamp_min(1e-30)).clamp_max(1e30))
    old, new = old.argmax(1), new.argmax(1)
    return [change, _percent(old != new), _percent(old == y), _percent(new == y)]


def _percent(which: Tensor) -> float:
    return 100 * float(which.double().mean())


def tasks(plan: Plan, part: str) -> Sequence[Task[Any]]:
    """Return the usual runs, or the worked example."""
    if part == _EXAMPLE:
        return [WorkedExamples(plan.data)]
    return [
        run
        for recipe in (PLAIN, NORMALIZED)
        for run in plan.runs(part, recipe, probes=(scaled_predictions,))
    ]


def _seen(plan: Plan, part: str, store: Store) -> dict[str, NDArray[np.float64]]:
    """Return by condition what was seen, a column for each seed."""
    recipes = {"plain": PLAIN, "batchnorm": NORMALIZED}
    results = {
        norm: whole(store, plan.runs(part, recipe, probes=(scaled_predictions,)))
        for norm, recipe in recipes.items()
    }
    return {
        condition: np.array([of.seen(scaled_predictions)[-1][mode] for of in results[norm]]).T
        for condition, (norm, mode) in _CONDITIONS.items()
    }


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare the outputs before and after, or work the example."""
    if part == _EXAMPLE:
        return _worked_example(plan, part, store)
    seen = _seen(plan, part, store)
    plain, ours = (seen[condition][0].tolist() for condition in ("plain", _BATCH))
    less = difference(ours, plain)
    means = {condition: of.mean(1) for condition, of in seen.items()}
    if not learned(means[_BATCH][2] / 100, plan):
        raise NotMeasured(f"The normalized {part} network learned nothing.")
    checks = {"outputs stay, with the batch's moments": max(ours) <= _LITTLE}
    if learned(means["plain"][2] / 100, plan):
        checks["outputs change less than without normalization"] = less.high < 0
    old = means[_OLD]
    return Finding(
        part,
        f"When the first layer of the {part} network gives {_FACTOR:g} times as much, the plain "
        f"network's outputs change by {short(means['plain'][0])} times themselves and "
        f"{means['plain'][1]:.1f}% of its predictions do; with the moments of the batch, the "
        f"normalized network's outputs change by {means[_BATCH][0]:.0e} and "
        f"{means[_BATCH][1]:.1f}% of its predictions. In evaluation with the running moments of "
        f"before, {old[1]:.1f}% of them change, and the accuracy goes from {old[2]:.1f}% to "
        f"{old[3]:.1f}%; after calibration {means['calibrated'][1]:.1f}% do.",
        f"{less.value:+.3g}",
        short(means["plain"][0]),
        f"{means[_BATCH][0]:.0e}",
        checks,
        [
            Row(
                condition,
                measure,
                of[place].tolist(),
                less if (condition, place) == (_BATCH, 0) else None,
            )
            for place, measure in enumerate(_MEASURES)
            for condition, of in seen.items()
        ],
    )


def _worked_example(plan: Plan, part: str, store: Store) -> Finding:
    outcome = worked(plan, store)
    off = furthest_from_limit(outcome)
    return Finding(
        part,
        "[2, 0, 2, 4] and [200, 0, 200, 400] both become [β, β − √2·γ, β, β + √2·γ], the more "
        f"exactly the smaller ε is: within {off:.0e} with ε = 1e-12.",
        f"within {off:.0e}",
        "100 × inputs",
        "the same",
        {"the same values from 100 times the inputs": off <= TOLERANCE},
        limit_rows(outcome),
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw how much changes, and the worked example."""
    made = []
    seen = {part: _seen(plan, part, store) for part in parts if part != _EXAMPLE}
    if seen:
        caption = (
            f"What changes when the first layer's weights are multiplied by {_FACTOR:g}: without "
            "normalization, and with it by the moments of the batch, by the running moments of "
            "before, and by calibrated ones. Each dot is a seed."
        )
        panels = [_panel(part, of, measure) for measure in _DRAWN for part, of in seen.items()]
        made.append(Chart("scaled-first-layer", caption, panels, "What changes", _DRAWN[0]))
    if _EXAMPLE in parts:
        caption = "How far both examples are from [β, β − √2·γ, β, β + √2·γ]."
        made.append(Chart("scaled-example", caption, [limit_panel(worked(plan, store))]))
    return made


def _panel(part: str, seen: dict[str, NDArray[np.float64]], drawn: str) -> Panel:
    styles = ["plain", "batchnorm", "other", "batchnorm"]
    if drawn == _DRAWN[1]:
        values = {condition: of[1].tolist() for condition, of in seen.items()}
        panel = beside(part, "predictions that change, %", values, styles=styles, start=-3, end=103)
    else:
        values = {condition: of[0].clip(_FLOOR).tolist() for condition, of in seen.items()}
        label = "relative change of the outputs"
        panel = beside(part, label, values, styles=styles, log=True, start=_FLOOR, end=1e3)
    return replace(panel, choice=drawn)


CLAIM = Claim(
    number=13,
    name="scale_invariance",
    title="No adjustment to the scale of another layer",
    says="Batch normalization reduces the dependence between layers: when a layer's outputs change "
    "their scale, the next layer sees the same as before, and needs no adjustment. Against it: "
    "this is so with the moments of the batch alone; running moments are those of before until "
    "they have caught up. A network of ReLUs without normalization only scales with its first "
    "layer, but for the biases behind it, so its outputs change, but hardly its predictions. And "
    "the scale of weights goes on to matter for learning: where they are 100 times as large, their "
    "gradient is a hundredth, and the same learning rate changes them less (van Laarhoven 2017, "
    "arXiv:1706.05350; Arora, Li & Lyu 2018, arXiv:1812.03981).",
    source="lecture notes; Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.3",
    measured="At the end of a run with the usual learning rate, the weights of the first linear "
    f"map, and its bias where it has one, are multiplied by {_FACTOR:g} in a copy. Its outputs for "
    "the held-out examples (at most 2000) are compared with those of the network as it is: of "
    "the plain network; of the normalized one with the moments of these examples, as a batch; in "
    "evaluation with the running moments that training left; and in evaluation after both were "
    "calibrated on training examples. The change of the outputs is the norm of their difference "
    "over the norm of those before, where what all classes of an example have in common is taken "
    "from both. The predictions are told beside it: they are blind to a factor of all outputs. "
    "The worked example compares [2, 0, 2, 4] with [200, 0, 200, 400], as claim 20 does.",
    rule="It holds for a network if with the moments of the batch, the outputs change by at most "
    f"{_LITTLE:.0%} for any seed, and if they change less than without normalization, with the 95% "
    "interval of the difference below 0. Where the plain network learned nothing, the first alone "
    "counts; where the normalized one did not, nothing does. The worked example must agree within "
    f"{TOLERANCE:g}. Old running moments decide nothing.",
    unit="relative change of the outputs",
    parts=("sigmoid", _EXAMPLE, "relu", "conv", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
