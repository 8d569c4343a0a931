"""Claim 4: batch normalization stabilizes training, and makes hyperparameters easier to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import curve
from batchnorm.study.measures.runs import NotMeasured, final, learned
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_NEAR = 0.02  # of accuracy: two points below the best still count as a good choice
_INITIALIZATIONS = {"own": "", "small": "small", "large": "large"}
_RECIPES = (PLAIN, NORMALIZED)


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs of all cells of the grid, without and with normalization."""
    return [run for recipe in _RECIPES for cell in _cells(plan, part, recipe) for run in cell]


def _rates(plan: Plan, part: str) -> tuple[float, ...]:
    """Every other rate, from the lowest on: half the cost, over nearly the same range."""
    return plan.networks[part].rates[::2]


def _cells(plan: Plan, part: str, recipe: Recipe) -> list[list[Run]]:
    """The runs of each initialization with each rate; those of a cell differ by the seed alone."""
    return [
        plan.runs(part, replace(recipe, initialization=initialization), rate)
        for initialization in _INITIALIZATIONS.values()
        for rate in _rates(plan, part)
    ]


def _ends(plan: Plan, part: str, recipe: Recipe, store: Store) -> list[list[float]]:
    """The accuracy that each cell's runs end with."""
    return [[final(store[run]) for run in cell] for cell in _cells(plan, part, recipe)]


def _best(cells: Sequence[Sequence[float]]) -> float:
    return max(float(np.mean(cell)) for cell in cells)


def _shares(cells: Sequence[Sequence[float]], enough: float) -> list[float]:
    """For each seed, the percentage of the cells that end with enough."""
    return [
        100 * float(np.mean([end >= enough for end in ends])) for ends in zip(*cells, strict=True)
    ]


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Count the cells that end near the best."""
    plain, ours = (_ends(plan, part, recipe, store) for recipe in _RECIPES)
    best = _best([*plain, *ours])
    if not learned(best, plan):
        raise NotMeasured(f"The {part} network learned nothing.")
    near = [_shares(cells, best - _NEAR) for cells in (plain, ours)]
    near_own = [_shares(cells, _best(cells) - _NEAR) for cells in (plain, ours)]
    more, more_own = (difference(with_, without, " points") for without, with_ in (near, near_own))
    without, with_ = (float(np.mean(shares)) for shares in near)
    return Finding(
        part,
        f"Of the {len(plain)} choices of learning rate and initialization, {without:.0f}% bring "
        f"the plain {part} network within 2 points of the best accuracy of all, {best:.1%}, and "
        f"{with_:.0f}% the normalized one: {more}. Within 2 points of its own best are "
        f"{np.mean(near_own[0]):.0f}% and {np.mean(near_own[1]):.0f}%.",
        str(replace(more, unit="")),
        f"{without:.0f}%",
        f"{with_:.0f}%",
        {
            "more choices near the best of all": more.low > 0,
            "more choices near the network's own best": more_own.low > 0,
        },
        [
            Row("plain", "choices near the best of all, %", near[0]),
            Row("batchnorm", "choices near the best of all, %", near[1], more),
            Row("plain", "choices near its own best, %", near_own[0]),
            Row("batchnorm", "choices near its own best, %", near_own[1], more_own),
        ],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw how accurate the choices are, from the best to the worst, and one by one."""
    return [
        Chart(
            "choices",
            "Held-out accuracy at the end of a run with each learning rate and initialization, "
            "from the best choice to the worst. Lines are medians over the seeds, bands reach from "
            "the lowest to the highest. Choices above the dotted line are near the best of all.",
            [_ranked(plan, part, store) for part in parts],
        ),
        Chart(
            "initializations",
            "The same by learning rate, for one initialization. Each dot is a seed, the lines join "
            "the medians.",
            [
                _by_rate(plan, part, store, place, name)
                for place, name in enumerate(_INITIALIZATIONS)
                for part in parts
            ],
            "Initialization",
            "small",
        ),
    ]


def _goal(plan: Plan, part: str, store: Store) -> tuple[float, str]:
    cells = [cell for recipe in _RECIPES for cell in _ends(plan, part, recipe, store)]
    return 100 * (_best(cells) - _NEAR), "near the best"


def _ranked(plan: Plan, part: str, store: Store) -> Panel:
    lines = []
    for recipe in _RECIPES:
        cells = _ends(plan, part, recipe, store)
        ranked = [
            sorted((100 * end for end in ends), reverse=True) for ends in zip(*cells, strict=True)
        ]
        share = [100 * (rank + 1) / len(cells) for rank in range(len(cells))]
        lines.append(curve(recipe.norm, share, ranked))
    return Panel(
        part,
        Axis("choices, from the best on, %", 0, 100),
        Axis("held-out accuracy at the end, %", 0, 102),
        lines,
        goal=_goal(plan, part, store),
    )


def _by_rate(plan: Plan, part: str, store: Store, place: int, name: str) -> Panel:
    rates = _rates(plan, part)
    series = []
    for recipe in _RECIPES:
        cells = _ends(plan, part, recipe, store)[place * len(rates) : (place + 1) * len(rates)]
        x = [rate for rate, ends in zip(rates, cells, strict=True) for _ in ends]
        y = [100 * end for ends in cells for end in ends]
        series.append(Series(recipe.norm, x, y, mark="dots"))
        series.append(Series(recipe.norm, rates, [100 * float(np.median(of)) for of in cells]))
    ticks = [(rate, f"{rate:g}") for rate in rates]
    return Panel(
        f"{part}, {name} initialization",
        Axis("learning rate", rates[0] / 1.5, rates[-1] * 1.5, log=True, ticks=ticks),
        Axis("held-out accuracy at the end, %", 0, 102),
        series,
        goal=_goal(plan, part, store),
        choice=name,
    )


CLAIM = Claim(
    number=4,
    name="stability",
    title="Stable training, easier hyperparameters",
    says="Batch normalization stabilizes training and makes hyperparameters easier to choose: one "
    "may be less careful about the learning rate and about the initialization. For it: with "
    "normalization the output of a layer does not depend on the scale of its weights, and the loss "
    "is smoother (Santurkar et al. 2018, arXiv:1805.11604). Against it: careful initialization can "
    "make residual networks as stable without any (Fixup, Zhang et al. 2019, arXiv:1901.09321), "
    "and very deep normalized networks without shortcuts have exploding gradients at the start "
    "(Yang et al. 2019, arXiv:1902.08129).",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), sections 1 and 3.3",
    measured="Each network is trained from three initializations: its own, the textbook's for its "
    "activation; a small one, with standard deviation 0.01; and a large one, three times Xavier's. "
    "Each of them is tried with every other learning rate of the network's grid, from the lowest "
    "on. A choice is good if the run ends, on the mean of its last three evaluations, within 2 "
    "points of the best: of the highest mean over the seeds that any choice reached, plain or "
    "normalized. For each seed we take the share of good choices, over the same choices for both "
    "networks; then again, each network compared with its own best choice, so that none is called "
    "unstable because it is less accurate everywhere.",
    rule="It holds for a network if the 95% interval over the seeds of the difference of the "
    "shares is above\u00a00, both near the best of all and near the network's own best.",
    unit="choices near the best",
    parts=("sigmoid", "conv", "relu", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
