"""Claim 3: batch normalization allows higher learning rates."""

from __future__ import annotations

import numpy as np

from batchnorm.study.charts import STYLES, Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding
from batchnorm.study.claims.measures import final, learned
from batchnorm.study.interval import ratio
from batchnorm.study.networks import NORMS
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store

_TRAINED = 0.5  # of the way from chance to the best that any run of the network ends with


def measure(plan: Plan, store: Store) -> list[Finding]:
    """Find the largest learning rate that still trains."""
    return [_with(network, plan, store) for network in plan.sizes]


def _with(network: str, plan: Plan, store: Store) -> Finding:
    rates = plan.sizes[network].rates
    if len(rates) == 1:
        return Finding(network, f"The {network} network was tried with one rate.", "one rate")
    highest = _highest(plan, store, network)
    if not learned(highest, plan):
        return Finding(network, f"The {network} network learned nothing.", "nothing learned")
    enough = _enough(highest, plan)

    def largest(norm: str, seed: int) -> float:
        trained = [r for r in rates if final(store[plan.run(network, norm, r, seed)]) >= enough]
        return max(trained, default=_below(rates))

    limits = {norm: [largest(norm, seed) for seed in plan.seeds] for norm in NORMS}
    if np.median(limits["plain"]) < rates[0]:
        sentence = f"The plain {network} network trained with no learning rate of the grid."
        return Finding(network, sentence, "no plain one")
    higher = {norm: ratio(limits[norm], limits["plain"]) for norm in NORMS}
    cells = {norm: _text(float(np.median(limits[norm])), rates) for norm in NORMS}
    ours = higher["batchnorm"]
    return Finding(
        network,
        f"The {network} network trains up to the rate {cells['plain']} without normalization, "
        f"and up to {cells['batchnorm']} with it: a factor of {ours}.",
        str(ours),
        cells,
        [ours.low > 1],
        [
            (
                network,
                STYLES[norm].name,
                ", ".join(_text(limit, rates) for limit in limits[norm]),
                "" if norm == "plain" else str(higher[norm]),
            )
            for norm in NORMS
        ],
    )


def _highest(plan: Plan, store: Store, network: str) -> float:
    """The best accuracy that any run of a network ends with."""
    return max(final(store[run]) for run in plan.grid() if run.network == network)


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


def charts(plan: Plan, store: Store) -> list[Chart]:
    """Draw what each learning rate leads to."""
    grids = [network for network, size in plan.sizes.items() if len(size.rates) > 1]
    caption = (
        "Held-out accuracy at the end of a run, by learning rate. Each dot is a seed, the lines "
        "join the medians. Runs above the dotted line count as trained."
    )
    panels = [_panel(plan, store, network) for network in grids]
    return [Chart("learning-rates", caption, panels)] if panels else []


def _panel(plan: Plan, store: Store, network: str) -> Panel:
    rates = plan.sizes[network].rates
    series = []
    for norm in NORMS:
        ends = [[100 * final(store[r]) for r in plan.runs(network, norm, rate)] for rate in rates]
        x = [rate for rate, seeds in zip(rates, ends, strict=True) for _ in seeds]
        series.append(Series(norm, x, [end for seeds in ends for end in seeds], mark="dots"))
        series.append(Series(norm, rates, [float(np.median(seeds)) for seeds in ends]))
    ticks = [(rate, f"{rate:g}") for rate in rates]
    return Panel(
        network,
        Axis("learning rate", rates[0] / 1.5, rates[-1] * 1.5, log=True, ticks=ticks),
        Axis("held-out accuracy at the end, %", 0, 102),
        series,
        goal=(100 * _enough(_highest(plan, store, network), plan), "trained above this"),
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
    "factor of about 3 or more. A run has trained if it ends at least half of the way from "
    "chance to the best that any run of that network ends with, the mean of its last three "
    "evaluations. For each seed we take the largest rate that has trained; if none has, the "
    "rate that would come before the grid. A limit is known only to the factor between two "
    "rates.",
    rule="It holds for a network if the factor's 95% interval over the seeds is above\u00a01.",
    unit="largest rate that trains",
    headings=("network", "norm", "largest rate, seed by seed", "higher, by"),
    tasks=Plan.grid,
    measure=measure,
    charts=charts,
)
