"""Claim 11: standardizing the inputs speeds up learning, as it rounds the loss surface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import ratio, short
from batchnorm.study.measures.drawing import beside, curve
from batchnorm.study.measures.runs import geometric, whole
from batchnorm.study.measures.standardized_inputs import (
    EXAMPLES,
    FLAT,
    PLACES,
    LeastSquares,
    Surface,
)
from batchnorm.study.measures.treatments import badly_scaled
from batchnorm.study.observation import Treatment
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store

_TREATMENTS: Mapping[str, Treatment | None] = {"as they are": None, "badly scaled": badly_scaled}
_INPUTS = {"raw": "plain", "centred": "other", "standardized": "batchnorm"}  # and styles


def tasks(plan: Plan, part: str) -> list[LeastSquares]:
    """Return a task for each seed."""
    features = math.prod(plan.shape)
    return [LeastSquares(plan.data, features, _TREATMENTS[part], seed) for seed in plan.seeds]


def _found(plan: Plan, part: str, store: Store) -> dict[str, list[Surface]]:
    """Return by the inputs, the surface of each seed."""
    outcomes = whole(store, tasks(plan, part))
    return {name: [Surface(**getattr(of, name)) for of in outcomes] for name in _INPUTS}


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare the condition numbers and the steps."""
    found = _found(plan, part, store)
    conditions = {name: [of.condition for of in each] for name, each in found.items()}
    counts = {name: [float(of.steps) for of in each] for name, each in found.items()}
    rounder, faster = (ratio(of["raw"], of["standardized"]) for of in (conditions, counts))
    means = {name: geometric(of) for name, of in counts.items()}
    return Finding(
        part,
        f"With the inputs {part}, gradient descent takes {short(means['raw'])} steps on raw, "
        f"{short(means['centred'])} on centred and {short(means['standardized'])} on standardized "
        f"inputs: {faster} fewer. The condition number becomes {rounder} smaller.",
        str(faster) if faster.high < 1e6 else f"{faster.value:.1e}×",
        short(means["raw"]),
        short(means["standardized"]),
        {"a smaller condition number": rounder.low > 1, "fewer steps": faster.low > 1},
        [
            Row(name, measure, of[name], ratio(of["raw"], of[name]) if name != "raw" else None)
            for measure, of in (
                ("condition number", conditions),
                ("steps until 1% of the excess is left", counts),
            )
            for name in _INPUTS
        ]
        + [
            Row(name, "directions that are not flat", [of.curved for of in found[name]])
            for name in _INPUTS
        ],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the eigenvalues and the steps."""
    found = {part: _found(plan, part, store) for part in parts}
    caption = (
        "The eigenvalues of the Hessian of a linear model's loss, in units of the largest: on a "
        "round surface all are 1. Lines are medians over the seeds."
    )
    return [
        Chart("loss-surface", caption, [_spectra(part, of) for part, of in found.items()]),
        Chart(
            "steps-of-gradient-descent",
            "How many steps gradient descent takes until 1% of the excess loss is left that there "
            "was at the start, with the rate 1 / (largest eigenvalue). Each dot is a seed, the "
            "bars are the medians.",
            [_steps(part, of) for part, of in found.items()],
        ),
    ]


def _spectra(part: str, found: Mapping[str, Sequence[Surface]]) -> Panel:
    places = np.linspace(0, 100, PLACES).tolist()
    ticks = [(10.0**power, f"1e{power}") for power in range(-10, 1, 2)]
    return Panel(
        part,
        Axis("place among the eigenvalues, %", 0, 100),
        Axis("eigenvalue / largest", FLAT, 1.5, log=True, ticks=ticks),
        [
            curve(style, places, [of.spectrum for of in found[name]], name)
            for name, style in _INPUTS.items()
        ],
    )


def _steps(part: str, found: Mapping[str, Sequence[Surface]]) -> Panel:
    values = {name: [float(of.steps) for of in each] for name, each in found.items()}
    return beside(part, "steps until 1% is left", values, styles=list(_INPUTS.values()), log=True)


CLAIM = Claim(
    number=11,
    name="standardized_inputs",
    title="Standardized inputs learn faster",
    says="Standardizing the inputs speeds up learning: it makes the loss surface rounder, so that "
    "one learning rate suits all directions. LeCun et al. show it for a linear model: a mean far "
    "from 0 makes one eigenvalue of the Hessian large, and unequal variances spread the others. "
    "Against it: it equalizes the variances and leaves the correlations; where small variances "
    "were noise, it makes them count as much as the others; and to whiten the inputs altogether, "
    "which makes the surface round, can prevent generalization (Wadia et al. 2021, "
    "arXiv:2008.07545).",
    source="lecture notes; LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, sections 4.3 and "
    "5.1",
    measured="A linear model with a bias is fitted to one-hot labels by least squares, in float64, "
    f"on a random half of the training examples for each seed (at most {EXAMPLES}): on the inputs "
    "raw, centred, and centred and divided by their standard deviations, where constant ones stay "
    "0; as they are, and badly scaled as in claim 10. The Hessian is XᵀX / N. Its condition number "
    f"is over the eigenvalues above {FLAT:g} of the largest: less is a flat direction, of "
    "constant or dependent inputs or near the rounding of float32, and neither counts nor is "
    "learned. The steps of gradient descent from 0 with the rate 1 / (largest eigenvalue), until "
    "1% of the loss's excess over the least possible one is left of what there was at the start, "
    "are computed in the basis of the eigenvectors.",
    rule="It holds if the 95% intervals over the seeds of both ratios, raw to standardized, of the "
    "condition number and of the steps, are above\u00a01.",
    unit="steps of gradient descent: raw, standardized",
    parts=tuple(_TREATMENTS),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
