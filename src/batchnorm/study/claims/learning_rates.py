"""Claim 3: batch normalization allows higher learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import ratio
from batchnorm.study.measures.rates import told_steps
from batchnorm.study.measures.runs import NotMeasured, final, learned
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_PARTS = ("sigmoid", "conv", "relu", "residual", "tanh", "elu")
_TRAINED = 0.5  # of the way from chance to the best that any run of the network ends with
_RECIPES = (PLAIN, NORMALIZED)


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the grid of learning rates."""
    return plan.grid(part, _RECIPES)


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Find the largest learning rate that still trains."""
    rates = plan.networks[part].rates
    if len(rates) == 1:
        raise NotMeasured(f"The {part} network was tried with one rate.")
    highest = _highest(plan, store, part)
    if not learned(highest, plan):
        raise NotMeasured(f"The {part} network learned nothing.")
    enough = _enough(highest, plan)

    def largest(recipe: Recipe, seed: int) -> float:
        ends = {rate: final(store[plan.run(part, recipe, rate, seed)]) for rate in rates}
        return max((rate for rate in rates if ends[rate] >= enough), default=_below(rates))

    plain, ours = ([largest(recipe, seed) for seed in plan.seeds] for recipe in _RECIPES)
    if np.median(plain) < rates[0]:
        raise NotMeasured(f"The plain {part} network trained with no learning rate of the grid.")
    factor = ratio(ours, plain)
    without, with_ = (_text(float(np.median(limits)), rates) for limits in (plain, ours))
    return Finding(
        part,
        f"The {part} network trains up to the rate {without} without normalization, "
        f"and up to {with_} with it: a factor of {factor}.",
        str(factor),
        without,
        with_,
        {"a larger rate trains with batch normalization": factor.low > 1},
        [
            Row("plain", "largest rate that trains", plain),
            Row("batchnorm", "largest rate that trains", ours, factor),
        ],
    )


def _highest(plan: Plan, store: Store, part: str) -> float:
    """The best accuracy that any run of a network ends with."""
    return max(final(store[run]) for run in tasks(plan, part))


def _enough(highest: float, plan: Plan) -> float:
    """The accuracy that a run must end with to have trained."""
    return plan.chance + _TRAINED * (highest - plan.chance)


def _below(rates: tuple[float, ...]) -> float:
    """The rate that would come before a grid's first one."""
    return rates[0] ** 2 / rates[1]


def _text(limit: float, rates: tuple[float, ...]) -> str:
    if limit < rates[0]:
        return "none"
    return f"{'≥ ' if limit == rates[-1] else ''}{limit:g}"


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw what each learning rate leads to."""
    caption = (
        "Held-out accuracy at the end of a run, by learning rate. Each dot is a seed, the lines "
        "join the medians. Runs above the dotted line count as trained."
    )
    return [Chart("learning-rates", caption, [_panel(plan, store, part) for part in parts])]


def _panel(plan: Plan, store: Store, part: str) -> Panel:
    rates = plan.networks[part].rates
    series = []
    for recipe in _RECIPES:
        ends = [[100 * final(store[r]) for r in plan.runs(part, recipe, rate)] for rate in rates]
        x = [rate for rate, seeds in zip(rates, ends, strict=True) for _ in seeds]
        series.append(Series(recipe.norm, x, [e for seeds in ends for e in seeds], mark="dots"))
        series.append(Series(recipe.norm, rates, [float(np.median(seeds)) for seeds in ends]))
    ticks = [(rate, f"{rate:g}") for rate in rates]
    return Panel(
        part,
        Axis("learning rate", rates[0] / 1.5, rates[-1] * 1.5, log=True, ticks=ticks),
        Axis("held-out accuracy at the end, %", 0, 102),
        series,
        goal=(100 * _enough(_highest(plan, store, part), plan), "trained above this"),
    )


CLAIM = Claim(
    number=3,
    name="learning_rates",
    title="Higher learning rates",
    says="Batch normalization allows higher learning rates: a layer's output does not change "
    "with the scale of its weights, so a step that is too long does not blow the activations "
    "up. Bjorck et al. (2018, arXiv:1806.02375) hold this to be the main cause of its other "
    "benefits.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.3",
    measured="Each network is trained with every learning rate of a grid, whose rates grow by a "
    "factor of about 3 or more, for the network's own number of steps "
    f"({told_steps(_PARTS)}). A run has trained if it ends at least half of the way from "
    "chance to the best that any run of that network ends with, the mean of its last three "
    "evaluations. For each seed we take the largest rate that has trained; if none has, the "
    "rate that would come before the grid. A limit is known only to the factor between two "
    "rates.",
    rule="It holds for a network if the factor's 95% interval over the seeds is above\u00a01.",
    unit="largest rate that trains",
    parts=_PARTS,
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
