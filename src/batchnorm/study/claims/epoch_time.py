"""Claim 2: an epoch takes longer with batch normalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from batchnorm.study.charts import STYLES, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import ratio, short
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.runs import whole
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.timing import Timing

_Seconds = Mapping[str, Sequence[float]]


def tasks(plan: Plan, part: str) -> list[Timing]:
    """Return the timing of a network."""
    return [Timing(plan.data, plan.networks[part], plan.repeats)]


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare the time of an epoch."""
    (times,) = whole(store, tasks(plan, part))
    rows = _rows("training, ms an epoch", times.training)
    rows += _rows("inference, ms an epoch", times.inference)
    effects = {(row.measure.split(",")[0], row.condition): row.effect for row in rows}
    theirs = effects["training", STYLES["torch"].name]
    ours = effects["training", STYLES["batchnorm"].name]
    folded, unfolded = (effects["inference", name] for name in ("folded", STYLES["torch"].name))
    assert theirs is not None
    assert ours is not None
    return Finding(
        part,
        f"An epoch of the {part} network takes {theirs} the time of the plain one with "
        f"torch.nn, and {ours} with batchnorm. At inference it takes {unfolded} with torch.nn, "
        f"and {folded} when batch normalization is folded into the linear maps.",
        f"{theirs.value:.2f}×, {ours.value:.2f}×",
        short(1e3 * float(np.median(times.training["plain"]))),
        short(1e3 * float(np.median(times.training["batchnorm"]))),
        {"longer with torch.nn": theirs.low > 1, "longer with batchnorm": ours.low > 1},
        rows,
    )


def _rows(measure: str, seconds: _Seconds) -> list[Row]:
    return [
        Row(
            STYLES[norm].name if norm in STYLES else norm,
            measure,
            [1e3 * second for second in of],
            ratio(of, seconds["plain"], robust=True) if norm != "plain" else None,
        )
        for norm, of in seconds.items()
    ]


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw all times that were taken."""
    times = {part: store[tasks(plan, part)[0]] for part in parts}
    panels = [_panel(f"{part}, training", of.training) for part, of in times.items()]
    panels += [_panel(f"{part}, inference", of.inference) for part, of in times.items()]
    caption = (
        "The time of an epoch. Each dot is one repetition, in which at most 50 batches are timed "
        "and counted up to an epoch; the bars are the medians."
    )
    return [Chart("epoch-time", caption, panels)]


def _panel(title: str, seconds: _Seconds) -> Panel:
    milliseconds = {norm: [1e3 * second for second in of] for norm, of in seconds.items()}
    # One epoch that something else held up would flatten all the others.
    highest = max(float(np.quantile(of, 0.9)) for of in milliseconds.values())
    return beside(title, "time of an epoch, ms", milliseconds, start=0, end=1.25 * highest)


CLAIM = Claim(
    number=2,
    name="epoch_time",
    title="A longer epoch",
    says="An epoch takes longer with batch normalization, because of the extra computation; fewer "
    "epochs make up for it.",
    source="lecture notes; Ioffe & Szegedy 2015 (arXiv:1502.03167) give no times",
    measured="Training is timed in one process on one thread, the norms in turn, on the same "
    "batches of 60, after a pass that warms up and checks that torch.nn and batchnorm give the "
    "same losses. A repetition times an epoch; of a longer one 50 batches, which are counted up to "
    "all of it. With batchnorm, the layer that normalizes computes the activation as well; with "
    "torch.nn, a layer of its own does. Then predicting the same examples is timed, also with "
    "torch.nn's batch normalization folded into the linear maps, once the predictions are checked "
    "to be the same. Nothing else of the study runs meanwhile. Effects are the medians of the "
    "ratios to the plain network, paired by repetition.",
    rule="It holds for a network if the 95% interval of the ratio to the plain network, over the "
    "repetitions, lies above\u00a01, both with torch.nn and with batchnorm, in training.",
    unit="ms an epoch of training; effect: torch.nn, batchnorm",
    parts=("sigmoid", "conv", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
