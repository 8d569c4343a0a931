"""Claim 20: the two worked examples of the notes."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.measures.examples import (
    BATCH,
    BETA,
    EPS,
    GAMMA,
    LARGE,
    SMALL,
    TOLERANCE,
    WorkedExamples,
    furthest_from_limit,
    limit_panel,
    limit_rows,
    worked,
)
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store

_NOTES = (-1.03, -0.74, -0.29, -0.15, 0.15, 2.06)  # what they say of the first example


def tasks(plan: Plan, part: str) -> list[WorkedExamples]:
    """Return the one task."""
    return [WorkedExamples(plan.data)]


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare what was computed with what the notes say."""
    outcome = worked(plan, store)
    off = furthest_from_limit(outcome)
    last = outcome.normalized["batchnorm"][-1]
    return Finding(
        part,
        f"The batch {list(BATCH)} has the mean {outcome.mean:g} and the variance "
        f"{outcome.variance:g}, and its last value becomes {last:.4f}. With γ = {GAMMA:g}, "
        f"β = {BETA:g} and ε = {EPS[-1]:g}, {list(SMALL)} and {list(LARGE)} both become "
        f"[β, β − √2·γ, β, β + √2·γ], within {off:.0e}, by the reference, torch.nn and batchnorm.",
        f"within {off:.0e}",
        f"notes {_NOTES[-1]}",
        f"{last:.2f}",
        {
            "the mean and the variance of the notes": (outcome.mean, outcome.variance) == (10, 46),
            "the normalized values of the notes, to two digits": all(
                tuple(round(value, 2) for value in values) == _NOTES
                for values in outcome.normalized.values()
            ),
            "100 times the values give the same as eps goes to 0": off <= TOLERANCE,
        },
        [
            Row("notes", "normalized values, one by one", _NOTES),
            *(
                Row(name, "normalized values, one by one", values)
                for name, values in outcome.normalized.items()
            ),
            *limit_rows(outcome),
        ],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the first example, and the second one's way to the limit."""
    outcome = worked(plan, store)
    ours = outcome.normalized["batchnorm"]
    first = Panel(
        "the first example",
        Axis("value", 0, 25),
        Axis("normalized", -1.5, 2.5),
        [
            Series("batchnorm", BATCH, ours),
            Series("other", BATCH, _NOTES, mark="dots", name="notes"),
        ],
    )
    caption = (
        "Left, the dots are the values in the notes, the line is what batchnorm makes of them. "
        "Right, how far the values 2, 0, 2, 4 and 200, 0, 200, 400 are, normalized, from "
        "[β, β − √2·γ, β, β + √2·γ]: their scale matters only as far as ε does."
    )
    return [Chart("worked-examples", caption, [first, limit_panel(outcome)])]


CLAIM = Claim(
    number=20,
    name="examples",
    title="The worked examples",
    says="The notes work two batches of one feature by hand. [3, 5, 8, 9, 11, 24] has the mean 10 "
    "and the variance 46, and becomes [−1.03, −0.74, −0.29, −0.15, 0.15, 2.06]. [2, 0, 2, 4] and "
    "[200, 0, 200, 400] both become [β, β − √2·γ, β, β + √2·γ]. The variance is divided by the "
    "number of values, 6, in the batch; the running variance of torch.nn and of batchnorm is "
    "divided by 5, and would be 55.2.",
    source="lecture notes; the equations are algorithm 1 of Ioffe & Szegedy 2015 "
    "(arXiv:1502.03167)",
    measured="Both examples are computed in float64 by batchnorm.reference, by torch.nn and by "
    "batchnorm's layer in training: the first with γ = 1, β = 0 and ε = 1e-5, the second with "
    f"γ = {GAMMA:g}, β = {BETA:g} and ε = 1e-2, 1e-5, 1e-8 and 1e-12.",
    rule="It holds if the mean and the variance are exactly the notes', if all three give the "
    "notes' normalized values when rounded to two digits, and if with the smallest ε none is "
    f"further than {TOLERANCE:g} from the limit.",
    unit="the first example's last value, normalized",
    parts=("layer",),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
