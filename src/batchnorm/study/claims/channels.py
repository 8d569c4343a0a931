"""Claim 19: for convolutions one mean and variance a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from batchnorm.study.charts import Chart
from batchnorm.study.claims import fewer_steps, internal_shift, landscape, learning_rates
from batchnorm.study.claims.claim import Claim, Finding, Judgement, Row
from batchnorm.study.interval import short
from batchnorm.study.measures.channels import (
    BY_POSITION,
    CHANNELS,
    EXAMPLES,
    PERMUTED,
    POSITIONS,
    ROLLED,
    ROWS,
    Channels,
    Compared,
)
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.implementations import NORMALIZE
from batchnorm.study.measures.runs import NotMeasured, whole
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.tasks import Task

_TOLERANCE = 1e-12  # float64 rounds at 1e-16
_FAR = 1e-3  # what no rounding explains
_FLOOR = 1e-17  # where no difference is drawn, as a logarithm has no 0
_LAYER = "layer"  # the part that needs no network
_OTHERS = (fewer_steps.CLAIM, learning_rates.CLAIM, internal_shift.CLAIM, landscape.CLAIM)


def tasks(plan: Plan, part: str) -> Sequence[Task[Any]]:
    """Return a task for each seed, if the examples have positions; or what the others ask for."""
    if part == _LAYER:
        return _compared(plan)
    return [task for claim in _OTHERS for task in claim.tasks(plan, part)]


def _compared(plan: Plan) -> list[Channels]:
    _, height, width = plan.shape
    return [Channels(plan.data, seed) for seed in plan.seeds] if height * width > 1 else []


def _found(plan: Plan, store: Store) -> list[Compared]:
    outcomes = whole(store, _compared(plan))
    if not outcomes:
        raise NotMeasured("The examples are features, and have no positions.")
    return outcomes


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Find the largest differences, or gather what other claims find for a network."""
    return _exactly(plan, store) if part == _LAYER else _gathered(plan, part, store)


def _gathered(plan: Plan, part: str, store: Store) -> Finding:
    """Gather what other claims find, under their numbers."""
    checks: dict[str, bool] = {}
    rows: list[Row] = []
    said, missing = [], []
    for claim in _OTHERS:
        try:
            found = claim.measure(plan, part, store)
        except NotMeasured as reason:
            missing.append(f"Claim {claim.number} was not measured: {reason}")
            continue
        said.append(f"claim {claim.number} ({claim.title}) {Judgement(claim, [found], []).answer}")
        checks |= {f"{claim.number}: {what}": bool(held) for what, held in found.checks.items()}
        rows += [
            replace(row, measure=f"{claim.number}: {row.measure}")
            for row in found.rows
            if row.effect
        ]
    if not said:
        raise NotMeasured(" ".join(missing))
    return Finding(
        part,
        " ".join([f"On the {part} network, {'; '.join(said)}.", *missing]),
        f"{sum(checks.values())} of {len(checks)} checks hold",
        checks=checks,
        rows=rows,
    )


def _exactly(plan: Plan, store: Store) -> Finding:
    found = _found(plan, store)
    by_channel, by_position = found[0].parameters
    # By what was done, the largest difference of any implementation, for each seed.
    done = {what: [max(of.largest[what].values()) for of in found] for what in found[0].largest}
    exact = max(max(done[what]) for what in (ROWS, PERMUTED, ROLLED))
    least = min(min(of.largest[BY_POSITION].values()) for of in found)
    return Finding(
        _LAYER,
        f"{CHANNELS} feature maps are normalized with {by_channel} learned numbers; with "
        f"moments by position there would be {by_position}. The result is that of the "
        f"{CHANNELS} columns of all positions, it moves with the picture, and any order of the "
        f"positions gives the same, all within {exact:.0e}. With moments by position, moving the "
        f"pictures changes the result by {short(least)} or more.",
        f"within {exact:.0e}",
        short(least),
        f"{exact:.0e}",
        {
            "the same as of all positions as rows": max(done[ROWS]) <= _TOLERANCE,
            "one γ and one β a channel": by_channel == 2 * CHANNELS,
            "the same in any order of the positions": max(done[PERMUTED]) <= _TOLERANCE,
            "moves with the picture": max(done[ROLLED]) <= _TOLERANCE,
            "does not with moments by position": least > _FAR,
        },
        [
            Row(name, f"largest difference, {what}", [of.largest[what][name] for of in found])
            for what in found[0].largest
            for name in found[0].largest[what]
        ]
        + [Row("by channel", "learned numbers", [by_channel])]
        + [Row("by position", "learned numbers", [by_position])],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the differences; the claims that are gathered have pictures of their own."""
    if _LAYER not in parts:
        return []
    found = _found(plan, store)
    caption = (
        "The largest difference between normalizing, then moving each picture circularly, and "
        "moving it first. Each dot is a batch. The dotted line is what rounding may do."
    )
    panels = [
        beside(
            what.removeprefix("rolled, "),
            "largest difference",
            {name: [max(of.largest[what][name], _FLOOR) for of in found] for name in NORMALIZE},
            styles=("other", "torch", "batchnorm"),
            log=True,
            start=_FLOOR,
            end=1e3,
            goal=(_TOLERANCE, "rounding"),
        )
        for what in (ROLLED, BY_POSITION)
    ]
    return [Chart("moments-by-channel", caption, panels)]


_NUMBERS = ", ".join(str(claim.number) for claim in _OTHERS)

CLAIM = Claim(
    number=19,
    name="channels",
    title="One mean and variance a channel",
    says="Behind a convolution, all positions of a channel are normalized by one mean and one "
    "variance, so that normalization obeys the convolutional property: what is found at one place "
    "is found in the same way at another. There are one γ and one β a channel. What is said of "
    "batch normalization elsewhere is said of convolutional networks, too.",
    source="lecture notes; Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.2",
    measured=f"For each seed {EXAMPLES} training examples are drawn (fewer if they have more than "
    f"{POSITIONS} positions together) and convolved circularly with {CHANNELS} random filters of "
    "3×3, in float64. The feature maps are normalized by batchnorm.reference, torch.nn and "
    "batchnorm, with random γ and β: as they are; as a matrix of N·H·W rows and C columns; with "
    "the positions of each example in a random order; and with each picture first rolled "
    "circularly by a random number of rows and columns. The last one is done again with a mean "
    "and a variance for each channel and position. What is compared is put back in its place. For "
    f"the convolutional networks, the claims {_NUMBERS} are measured as they are there; the rows "
    "are their effects.",
    rule=f"It holds if with moments by channel no value differs by more than {_TOLERANCE:g}, if a "
    "layer learns two numbers a channel, and if with moments by position, the largest difference "
    f"of each batch that is rolled is above {_FAR:g}; for a network if all checks of those claims "
    "hold.",
    unit="largest difference when pictures move: by position, by channel",
    parts=(_LAYER, "conv", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
