"""Claim 9: normalization stands before the activation, which is more popular, or after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import Interval, difference
from batchnorm.study.measures.drawing import accuracies, beside, steps_axis
from batchnorm.study.measures.rates import at_own_rate, tried
from batchnorm.study.measures.runs import NotMeasured, final, learned
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_RECIPES = {"plain": PLAIN, "before": NORMALIZED, "after": replace(NORMALIZED, place="after")}
_STYLES = {"plain": "plain", "before": "batchnorm", "after": "after"}


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs with either place and without normalization, with a few rates."""
    return [run for of in _RECIPES.values() for runs in tried(plan, part, of) for run in runs]


def _chosen(plan: Plan, part: str, store: Store) -> dict[str, Sequence[Run]]:
    """The runs of each condition, with the rate that suits it best."""
    return {name: at_own_rate(store, tried(plan, part, of)) for name, of in _RECIPES.items()}


def _accuracies(plan: Plan, part: str, store: Store) -> dict[str, list[float]]:
    chosen = _chosen(plan, part, store)
    return {name: [100 * final(store[run]) for run in runs] for name, runs in chosen.items()}


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare the accuracies at the end."""
    ends = _accuracies(plan, part, store)
    if not learned(max(float(np.mean(of)) for of in ends.values()) / 100, plan):
        raise NotMeasured(f"The {part} network learned nothing.")
    rates = {name: runs[0].learning_rate for name, runs in _chosen(plan, part, store).items()}
    before, after = (difference(ends[place], ends["plain"], " points") for place in _PLACES)
    lead = difference(ends["after"], ends["before"], " points")
    effects = {"before": before, "after": after}
    means = {name: float(np.mean(of)) for name, of in ends.items()}
    return Finding(
        part,
        f"The {part} network ends with an accuracy of {means['plain']:.1f}% without normalization, "
        f"{means['before']:.1f}% with it before the activation ({before}), and "
        f"{means['after']:.1f}% with it after ({after}). {_better(lead)}: after against before, "
        f"{lead}.",
        str(replace(before, unit="")),
        f"{means['plain']:.1f}%",
        f"{means['before']:.1f}, {means['after']:.1f}",
        {
            "before the activation beats none": before.low > 0,
            "after the activation beats none": after.low > 0,
        },
        [
            *(
                Row(name, f"accuracy, %, rate {rates[name]:g}", of, effects.get(name))
                for name, of in ends.items()
            ),
            Row(
                "after against before",
                "points of accuracy",
                np.subtract(ends["after"], ends["before"]).tolist(),
                lead,
            ),
        ],
    )


_PLACES = ("before", "after")


def _better(lead: Interval) -> str:
    if lead.low > 0:
        return "After is better"
    return "Before is better" if lead.high < 0 else "Neither place is better for certain"


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the accuracies at the end, and on the way."""
    return [
        Chart(
            "places",
            "Held-out accuracy at the end, without normalization, with it before the activation, "
            "and after it, each with the learning rate that suits it best. Each dot is a seed, the "
            "bars are medians.",
            [_panel(plan, part, store) for part in parts],
        ),
        Chart(
            "places-learning",
            "Accuracy of the same runs while the networks learn. Lines are medians over the seeds, "
            "bands reach from the lowest to the highest.",
            [_curves(plan, part, store) for part in parts],
        ),
    ]


def _panel(plan: Plan, part: str, store: Store) -> Panel:
    ends = _accuracies(plan, part, store)
    values = {"plain": ends["plain"], "norm before": ends["before"], "norm after": ends["after"]}
    return beside(part, "held-out accuracy at the end, %", values, styles=list(_STYLES.values()))


def _curves(plan: Plan, part: str, store: Store) -> Panel:
    lines = [
        accuracies(_STYLES[name], [store[run] for run in runs], name)
        for name, runs in _chosen(plan, part, store).items()
    ]
    return Panel(
        part,
        steps_axis(plan, part),
        Axis("held-out accuracy, %", 0, 102),
        lines,
    )


CLAIM = Claim(
    number=9,
    name="placement",
    title="Before or after the activation, either helps",
    says="Normalization may stand before the activation, which is more popular, or after it. For "
    "before: what a linear map puts out is more symmetric and nearer to a normal distribution, so "
    "mean and variance say more about it (Ioffe & Szegedy 2015, section 3.2). For after: the next "
    "map then sees inputs that are themselves standardized; it was more accurate with ReLU on "
    "ImageNet (Mishkin et al. 2016, arXiv:1606.02228), and Chen et al. (2019, arXiv:1905.05928) "
    "advise it, with dropout. Against either as a rule: in residual networks the order of all "
    "layers of a block matters (He et al. 2016, arXiv:1603.05027).",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.2, for before; lecture notes for "
    "both",
    measured="Each network is trained without normalization, with it before each activation, and "
    "with it after, from the same initial weights, on the same batches, with three learning rates: "
    "the network's usual one and the two above it in its grid. Each of the three variants keeps "
    "the rate with which it ends most accurate, on the mean over the seeds. We compare that "
    "held-out accuracy at the end, the mean of the last three evaluations. Which place is better "
    "is told, but no part of the verdict: a place may be more popular and no better. In a block of "
    "the residual network the second normalization stands before the sum either way, as the "
    "activation comes only after it: there, after means behind the first activation of the block.",
    rule="It holds for a network if both places are more accurate than no normalization, each with "
    "a 95% interval of the difference over the seeds above\u00a00.",
    unit="accuracy; effect: before − plain",
    parts=("relu", "sigmoid", "conv", "residual", "tanh"),
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
