"""Claim 2: an epoch takes longer with batch normalization."""

from __future__ import annotations

import numpy as np

from batchnorm.study.charts import STYLES, Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding
from batchnorm.study.interval import ratio
from batchnorm.study.networks import NORMS
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.timing import Timing


def tasks(plan: Plan) -> list[Timing]:
    """Return the timing of each network."""
    return [_timing(network, plan) for network in plan.sizes]


def measure(plan: Plan, store: Store) -> list[Finding]:
    """Compare the time of an epoch."""
    return [_with(network, plan, store) for network in plan.sizes]


def _timing(network: str, plan: Plan) -> Timing:
    return Timing(plan.data, network, plan.sizes[network].usual_rate, plan.repeats)


def _with(network: str, plan: Plan, store: Store) -> Finding:
    times = store[_timing(network, plan)]
    if times.reason:
        return Finding(network, f"The {network} network was not timed: {times.reason}.", "no time")
    quartiles = {norm: 1e3 * np.quantile(times.seconds[norm], [0.25, 0.5, 0.75]) for norm in NORMS}
    longer = {
        norm: ratio(times.seconds[norm], times.seconds["plain"], robust=True) for norm in NORMS
    }
    theirs, ours = longer["torch"], longer["batchnorm"]
    return Finding(
        network,
        f"An epoch of the {network} network takes {theirs} the time of the plain one with "
        f"torch.nn, and {ours} with batchnorm.",
        f"{theirs.value:.2f}×, {ours.value:.2f}×",
        {norm: f"{quartiles[norm][1]:.3g}" for norm in NORMS},
        [theirs.low > 1, ours.low > 1],
        [
            (
                network,
                STYLES[norm].name,
                f"{quartiles[norm][1]:.3g}",
                f"{quartiles[norm][0]:.3g}–{quartiles[norm][2]:.3g}",
                "" if norm == "plain" else str(longer[norm]),
            )
            for norm in NORMS
        ],
    )


def charts(plan: Plan, store: Store) -> list[Chart]:
    """Draw all times that were taken."""
    panels = [
        _panel(network, store[timing].seconds)
        for network, timing in zip(plan.sizes, tasks(plan), strict=True)
        if not store[timing].reason
    ]
    caption = "The time of an epoch of training. Each dot is one epoch, the bars are the medians."
    return [Chart("epoch-time", caption, panels)] if panels else []


def _panel(network: str, seconds: dict[str, list[float]]) -> Panel:
    series = []
    for place, norm in enumerate(NORMS):
        times = [1e3 * second for second in seconds[norm]]
        spread = np.linspace(-0.2, 0.2, len(times)) + place
        series.append(Series(norm, spread.tolist(), times, mark="dots"))
        series.append(Series(norm, [place], [float(np.median(times))], mark="bar"))
    # One epoch that something else held up would flatten all the others.
    highest = 1e3 * max(float(np.quantile(times, 0.9)) for times in seconds.values())
    ticks = [(place, STYLES[norm].name) for place, norm in enumerate(NORMS)]
    return Panel(
        network,
        Axis("", -0.5, len(NORMS) - 0.5, ticks=ticks),
        Axis("time of an epoch, ms", 0, 1.25 * highest),
        series,
    )


CLAIM = Claim(
    number=2,
    name="epoch_time",
    title="A longer epoch",
    says="An epoch takes longer with batch normalization, because of the extra computation; fewer "
    "epochs make up for it.",
    source="lecture notes; Ioffe & Szegedy 2015 (arXiv:1502.03167) give no times",
    measured="An epoch of training is timed in one process on one thread, the norms in turn, on "
    "the same batches, after a pass that warms up and checks that torch.nn and batchnorm give "
    "the same losses. Nothing else of the study runs meanwhile.",
    rule="It holds for a network if the 95% interval of the ratio to the plain network, over the "
    "repetitions, lies above\u00a01, both with torch.nn and with batchnorm.",
    unit="ms an epoch",
    headings=("network", "norm", "median, ms", "quartiles, ms", "longer, by"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
