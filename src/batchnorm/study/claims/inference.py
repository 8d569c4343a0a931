"""Claim 17: at inference the running averages are used, so one example alone can be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import curve, ends, reaching
from batchnorm.study.measures.inference import ALONE, BATCHES, Predicted, at_inference
from batchnorm.study.measures.runs import whole
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_MOMENTA = (0.001, 0.01, 0.1, 0.5)
_USUAL = 0.1
_STEPS = 300  # or all of a shorter run
_TOLERANCE = 1e-5  # of float32 outputs: one example is multiplied in another order than many
_POINTS = 1.0

_Key: TypeAlias = Literal["means", "variances", "running", "population"]
_DISTANCES: tuple[_Key, _Key] = ("means", "variances")
_ACCURACIES: tuple[_Key, _Key] = ("running", "population")


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return runs that differ by the momentum of their running averages."""
    return [run for momentum in _MOMENTA for run in _runs(plan, part, momentum)]


def _runs(plan: Plan, part: str, momentum: float) -> list[Run]:
    recipe = Recipe("batchnorm", momentum=momentum)
    return plan.runs(part, recipe, steps=_steps(plan, part), probes=(at_inference,))


def _steps(plan: Plan, part: str) -> int:
    return min(_STEPS, plan.networks[part].steps)


def _seen(plan: Plan, part: str, momentum: float, store: Store) -> list[Predicted]:
    return [result.seen(at_inference)[0] for result in whole(store, _runs(plan, part, momentum))]


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare one example with many, and the running averages with the population's moments."""
    seen = {momentum: _seen(plan, part, momentum, store) for momentum in _MOMENTA}
    usual = seen[_USUAL]
    running, population = ([100 * one[which] for one in usual] for which in _ACCURACIES)
    gap = difference(running, population, " points")
    alone = [one["alone"] for one in usual]
    changed = [100 * one["changed"] for one in usual]
    in_training = (
        "one alone is refused"
        if all(one["refused"] for one in usual)
        else "one alone is normalized by the moments of its own positions"
    )
    return Finding(
        part,
        f"In evaluation, the {part} network's outputs for one example are those in a batch, within "
        f"{max(alone):.0e}. In training {in_training}, and of many, {np.mean(changed):.1f}% "
        f"get another class in another batch. With running averages of momentum {_USUAL:g} it "
        f"has {np.mean(running):.1f}% right, with the population's moments "
        f"{np.mean(population):.1f}%.",
        f"{gap.value:+.2f} points",
        f"{np.mean(population):.1f}%",
        f"{np.mean(running):.1f}%",
        {
            "the same outputs alone and in a batch": max(alone) <= _TOLERANCE,
            "as accurate as with the population's moments": gap.low >= -_POINTS
            and gap.high <= _POINTS,
        },
        [
            Row("evaluation", "alone or in a batch, difference", alone),
            Row("training", "another class in another batch, %", changed),
            *(row for momentum, of in seen.items() for row in _rows(f"momentum {momentum:g}", of)),
        ],
    )


def _rows(condition: str, seen: Sequence[Predicted]) -> list[Row]:
    running, population = ([100 * one[which] for one in seen] for which in _ACCURACIES)
    gap = difference(running, population, " points")
    return [
        Row(condition, "running means, std off", [one["means"] for one in seen]),
        Row(condition, "running variances, log ratio", [one["variances"] for one in seen]),
        Row(condition, "accuracy with running averages, %", running, gap),
        Row(condition, "accuracy with population moments, %", population),
    ]


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw, by the momentum, how far the running averages are off, and what that costs."""
    return [
        Chart(
            "running-averages",
            "How far running averages are from the moments of the training examples, in standard "
            "deviations and as the logarithm of the ratio of variances, and the held-out accuracy "
            "with either, by how much a batch counts in them. Bands reach over the seeds.",
            [
                panel
                for part in parts
                for panel in (
                    _panel(plan, part, store, _DISTANCES),
                    _panel(plan, part, store, _ACCURACIES),
                )
            ],
        )
    ]


def _panel(plan: Plan, part: str, store: Store, keys: Sequence[_Key]) -> Panel:
    seen = [_seen(plan, part, momentum, store) for momentum in _MOMENTA]
    factor = 100 if keys is _ACCURACIES else 1
    lines = []
    for key, style in zip(keys, ("batchnorm", "other"), strict=True):
        seeds = zip(*([factor * one[key] for one in of] for of in seen), strict=True)
        lines.append(curve(style, _MOMENTA, list(seeds), key))
    ticks = [(momentum, f"{momentum:g}") for momentum in _MOMENTA]
    return Panel(
        f"{part}, {_steps(plan, part)} steps",
        Axis("momentum", _MOMENTA[0], _MOMENTA[-1], log=True, ticks=ticks),
        Axis("held-out accuracy, %", 0, 102)
        if keys is _ACCURACIES
        else reaching("distance", ends(lines), log=True),
        lines,
    )


CLAIM = Claim(
    number=17,
    name="inference",
    title="One example alone can be predicted",
    says="In training an example is normalized by the moments of its batch; at inference the "
    "running averages of these moments take their place, so that a prediction is the example's "
    "own, and one alone has one. Against running averages, Wu & Johnson (2021, arXiv:2105.07576) "
    "found that they lag behind a network that moves, and that the moments of a few thousand "
    "examples, taken once the weights are final, predict better and more steadily; and Ioffe "
    "(2017, arXiv:1702.03275) that training and inference drift apart for small batches.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.1, algorithm 2",
    measured=f"Networks train for {_STEPS} steps, or all of a shorter run, with the usual rate on "
    f"batches of 60. Then {ALONE} held-out examples are predicted in evaluation, together and one "
    "by one: the largest difference of an output, as a share of the largest output. In training, "
    "one alone is tried, and all held-out examples are predicted twice in batches of 60, in two "
    "orders. The moments of the population are those of the training examples (of up to "
    f"{60 * BATCHES} of them), taken by batchnorm.calibrate in batches of 60 with the final "
    "weights. How far the running averages are off is the mean over the channels, then over the "
    "layers, of the difference of the means in standard deviations, and of the size of the "
    "logarithm of the ratio of the variances; for each momentum, which changes nothing else. "
    "A momentum of 0.001 still has 74% of the 0 and 1 that it started from after 300 steps.",
    rule=f"It holds for a network if no output differs by more than {_TOLERANCE:g}, and if the 95% "
    "interval over the seeds of the accuracy with running averages of momentum "
    f"{_USUAL:g}, less the accuracy with the population's moments, lies within "
    f"{_POINTS:g}\u00a0point.",
    unit="accuracy: population, running",
    parts=("sigmoid", "conv", "relu"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
