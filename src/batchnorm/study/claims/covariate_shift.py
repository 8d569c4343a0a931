"""Claim 8: a model that was trained on one distribution fails on another, and must be retrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from batchnorm.diagnose import TOLERANCE
from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.covariate_shift import (
    MOST,
    RATE,
    SAMPLES,
    SHARE,
    Seen,
    flagged_share,
    seen,
    shifted_and_adapted,
    won_back,
)
from batchnorm.study.measures.drawing import curve, reaching
from batchnorm.study.measures.runs import NotMeasured, learned, whole
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.shifts import SEVERITIES, SHIFTS
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_FAILED = 5.0  # points of accuracy: less is no failure
_FLAGGED = 0.95  # of the shifts of each seed
_ALARMS = 2 * RATE  # of clean samples: more are not what the test is for
_STRONG = 3  # the severity from which a shift must be flagged
_STYLES = ("plain", "after", "batchnorm", "ghost", "renormalized", "other")
_ALL = "all shifts"


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the usual runs, without and with normalization."""
    return [run for recipe in (PLAIN, NORMALIZED) for run in _runs(plan, part, recipe)]


def _runs(plan: Plan, part: str, recipe: Recipe) -> list[Run]:
    return plan.runs(part, recipe, probes=(shifted_and_adapted,))


def _conditions(plan: Plan, part: str, store: Store) -> dict[str, tuple[Seen, int]]:
    """Return what was seen of each condition, and the place of its accuracy in a look.

    The plain network is for comparison, and is left out where one of its runs broke off.
    """
    ours = seen(whole(store, _runs(plan, part, NORMALIZED)))
    conditions = {"batchnorm": (ours, 0), "adapted": (ours, 1)}
    with suppress(NotMeasured):
        conditions = {"plain": (seen(whole(store, _runs(plan, part, PLAIN))), 0), **conditions}
    return conditions


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare accuracies and scores, on inputs as they are and shifted."""
    conditions = _conditions(plan, part, store)
    ours, _ = conditions["batchnorm"]
    clean = ours.clean[0]
    if not learned(float(clean.mean()) / 100, plan):
        raise NotMeasured(f"The {part} network learned nothing.")
    worst, adapted = ours.looks[:, -1, 0].mean(0), ours.looks[:, -1, 1].mean(0)
    fallen = difference(worst, clean, " points")
    flagged, alarms = difference(flagged_share(ours, _STRONG), [0.0]), float(ours.alarms.mean())
    little, much = won_back(ours, _FAILED)
    without = (
        f" (without normalization {conditions['plain'][0].looks[:, -1, 0].mean():.1f}%)"
        if "plain" in conditions
        else ""
    )
    return Finding(
        part,
        f"The {part} network has {clean.mean():.1f}% right, and under the strongest shifts "
        f"{worst.mean():.1f}%{without}. The score of its moments flags {flagged.value:.0%} of "
        f"the shifts from severity {_STRONG} on, and {alarms:.0%} of clean samples. Adapted "
        f"without labels, it has {adapted.mean():.1f}% right: clearly less than half of what was "
        f"lost is won back under {_listed(little)}, about half or more under {_listed(much)}.",
        str(fallen),
        f"{clean.mean():.1f}%",
        f"{worst.mean():.1f}%",
        {
            "fails under the strongest shifts": fallen.high < -_FAILED,
            "the score flags shifts without labels": flagged.low >= _FLAGGED and alarms <= _ALARMS,
            "must be retrained, whatever the shift": bool(little) and not much,
        },
        _rows(conditions),
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names) or "none"


def _rows(conditions: Mapping[str, tuple[Seen, int]]) -> list[Row]:
    right, strongest = "held-out examples right, %", f"severity {SEVERITIES[-1]}"
    ours, _ = conditions["batchnorm"]
    rows = [
        Row(f"clean, {condition}", right, of.clean[look].tolist())
        for condition, (of, look) in conditions.items()
    ]
    for place, name in enumerate(_names(ours)):
        for condition, (of, look) in conditions.items():
            values = _with_all(of)[place, -1, look]
            lost = difference(values, of.clean[0], " points")
            rows.append(Row(f"{name}, {strongest}, {condition}", right, values.tolist(), lost))
    rows += [
        Row("clean", "flagged by the score, %", (100 * ours.alarms).tolist()),
        Row(
            f"shifts from severity {_STRONG} on",
            "flagged by the score, %",
            [100 * share for share in flagged_share(ours, _STRONG)],
        ),
    ]
    middle = SEVERITIES.index(_STRONG)
    for name, look in zip(ours.names, ours.looks, strict=True):
        rows.append(Row(f"{name}, severity {_STRONG}", "score", look[middle, 2].tolist()))
    return rows


def _names(of: Seen) -> list[str]:
    return [_ALL, *of.names]


def _with_all(of: Seen) -> NDArray[np.float64]:
    """The looks of each shift, after the mean of all shifts."""
    return np.concatenate([of.looks.mean(0, keepdims=True), of.looks])


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw accuracy and score by severity."""
    found = {part: _conditions(plan, part, store) for part in parts}
    ours = {part: of["batchnorm"][0] for part, of in found.items()}
    return [
        Chart(
            "accuracy-under-shift",
            "Accuracy on held-out examples that are shifted more and more, as the networks were "
            "trained, and with batch normalization's moments re-estimated on other shifted "
            "examples without labels. Lines are medians over the seeds, bands reach from the "
            "lowest to the highest; severity 0 is no shift.",
            [
                _accuracies(part, place, found[part])
                for place in range(max(len(_names(of)) for of in ours.values()))
                for part in parts
            ],
            "Shift",
            _ALL,
        ),
        Chart(
            "shift-score",
            "The distance between the moments that the network has kept and those of shifted "
            "inputs, which needs no labels. Under the dotted line, what each channel moves by a "
            "tenth of a standard deviation, nothing is flagged.",
            [_scores(part, ours[part]) for part in parts],
        ),
    ]


def _severity() -> Axis:
    return Axis("severity", 0, SEVERITIES[-1], ticks=[(at, f"{at}") for at in (0, *SEVERITIES)])


def _accuracies(part: str, place: int, conditions: Mapping[str, tuple[Seen, int]]) -> Panel:
    name = _names(conditions["batchnorm"][0])[place]
    lines = []
    for condition, (of, look) in conditions.items():
        values = np.vstack([of.clean[look], _with_all(of)[place, :, look]])
        style = "after" if condition == "adapted" else condition
        lines.append(curve(style, (0, *SEVERITIES), values.T.tolist(), condition))
    y = Axis("held-out accuracy, %", 0, 102)
    return Panel(f"{part}, {name}", _severity(), y, lines, choice=name)


def _scores(part: str, of: Seen) -> Panel:
    lines = [
        curve(style, SEVERITIES, look[:, 2].clip(1e-9).T.tolist(), name)
        for style, name, look in zip(_STYLES, of.names, of.looks, strict=False)
    ]
    values = [*(line.low for line in lines), *(line.high for line in lines), [TOLERANCE]]
    label = "score of the moments"
    y = reaching(label, values, log=True)
    return Panel(part, _severity(), y, lines, goal=(TOLERANCE, "no shift"))


CLAIM = Claim(
    number=8,
    name="covariate_shift",
    title="Covariate shift makes a model fail",
    says="A model that was trained on one distribution fails on another, and must be retrained. "
    "Against the second part: the kept moments of batch normalization are what a shift of style "
    "makes wrong, and re-estimating them on inputs without labels wins back much of the accuracy "
    "(Li et al. 2016, arXiv:1603.04779; Nado et al. 2020, arXiv:2006.10963; Schneider et al. 2020, "
    "arXiv:2006.16971). It does less for shifts that change the content, and for natural ones "
    "(Nado et al.).",
    source="lecture notes; Shimodaira 2000, Improving predictive inference under covariate shift; "
    "the shifts follow Hendrycks & Dietterich 2019 (arXiv:1903.12261)",
    measured="At the end of runs with the usual learning rate, the held-out examples are split "
    f"into two halves of at most {MOST}. Both are shifted in each of "
    f"{len(SHIFTS)} ways (of which features bear fewer than pictures), in {len(SEVERITIES)} "
    "severities. Accuracy is on the second half: as the network was trained; and adapted. "
    "Adaptation is batchnorm.adapt on the first half, without labels: the running moments are "
    "blended with those of these inputs, with the weights that it chooses by itself, and gamma, "
    "beta and all weights stay. Scores and flags are batchnorm.measure_shift's, of one in "
    f"{SHARE} examples of the second half: the symmetric Kullback-Leibler divergence between the "
    "normal distributions of the kept moments and of those that the layers get in evaluation, "
    "less what it is by chance, the mean over a layer's channels, then over the layers; a shift "
    f"is flagged if chance would give it in less than {RATE:.0%} of samples, and it is above "
    f"{TOLERANCE:g}. How many clean samples are flagged is counted on {SAMPLES} random samples of "
    "as many examples of the second half, each without replacement.",
    rule=f"It holds for a network if, as the mean over the shifts at severity {SEVERITIES[-1]}, "
    f"the accuracy falls by more than {_FAILED:g} points; if the score flags at least "
    f"{_FLAGGED:.0%} of the shifts from severity {_STRONG} on; and if under every shift that takes "
    f"more than {_FAILED:g} points at severity {SEVERITIES[-1]}, adaptation wins back less than "
    "half of them, and there is such a shift: each with the whole 95% interval over the seeds. The "
    f"score must, besides, flag no more than {_ALARMS:.0%} of the clean samples, as the mean over "
    "the seeds.",
    unit=f"held-out accuracy: clean, and at severity {SEVERITIES[-1]}",
    parts=("conv", "relu", "residual", "sigmoid"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
