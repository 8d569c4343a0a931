"""What several claims draw: curves over the steps, and values side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from batchnorm.study.charts import STYLES, Axis, Panel, Series
from batchnorm.study.observation import Probe, Result
from batchnorm.study.plan import Plan


def curve(
    style: str, x: Sequence[float], runs: Sequence[Sequence[float]], name: str = ""
) -> Series:
    """Return the median of several runs' values, in a band from the lowest to the highest.

    Runs that broke off end the curve: no value in it is from fewer runs than the others.
    """
    values = np.array(list(zip(*runs, strict=False)), float).reshape(-1, len(runs))
    low, middle, high = np.quantile(values, [0, 0.5, 1], axis=1).tolist()
    return Series(style, x[: len(values)], middle, low, high, name=name)


def beside(
    title: str,
    label: str,
    values: Mapping[str, Sequence[float]],
    *,
    styles: Sequence[str] = (),
    log: bool = False,
    start: float | None = None,
    end: float | None = None,
    goal: tuple[float, str] | None = None,
) -> Panel:
    """Return a panel of values side by side: dots for the seeds, a bar for their median.

    Args:
        title: What sets it apart from other panels.
        label: What is measured, with its unit.
        values: By condition, the value of each seed.
        styles: The style of each condition; by default the condition is one, or `other`.
        log: Whether equal ratios are equally long.
        start: The value at the foot of the panel; by default a little below the lowest.
        end: The value at its head.
        goal: A height that is marked across the panel, and its name.
    """
    series = []
    for place, (condition, seeds) in enumerate(values.items()):
        style = styles[place] if styles else condition if condition in STYLES else "other"
        spread = (np.linspace(-0.15, 0.15, len(seeds)) + place).tolist()
        series.append(Series(style, spread, list(seeds), mark="dots", name=condition))
        middle = float(np.median(seeds))
        series.append(Series(style, [place], [middle], mark="bar", name=condition))
    names = [STYLES[condition].name if condition in STYLES else condition for condition in values]
    return Panel(
        title,
        Axis("", -0.5, len(values) - 0.5, ticks=list(enumerate(names))),
        reaching(label, [*values.values(), *([[goal[0]]] if goal else [])], log, start, end),
        series,
        goal=goal,
    )


def reaching(
    label: str,
    values: Sequence[Sequence[float]],
    log: bool = False,
    start: float | None = None,
    end: float | None = None,
) -> Axis:
    """Return an axis on which all values have room."""
    flat = [value for some in values for value in some if math.isfinite(value)]
    if log:
        flat = [value for value in flat if value > 0] or [1.0]
        low, high = min(flat) / 1.5, max(flat) * 1.5
    else:
        flat = flat or [0.0, 1.0]
        room = 0.08 * (max(flat) - min(flat)) or 0.1 * abs(max(flat)) or 1.0
        low, high = min(flat) - room, max(flat) + room
    return Axis(label, low if start is None else start, high if end is None else end, log)


def longest(results: Sequence[Result]) -> list[int]:
    """Return the evaluated steps of the run that went on longest."""
    return max((result.steps for result in results), key=len)


def accuracies(style: str, results: Sequence[Result], name: str = "") -> Series:
    """Return the curve of the held-out accuracies of several runs, in percent."""
    percent = [[100 * accuracy for accuracy in result.accuracies] for result in results]
    return curve(style, longest(results), percent, name)


def steps_axis(plan: Plan, part: str) -> Axis:
    """Return the axis of the steps that have been taken."""
    return Axis("steps", 1, plan.networks[part].steps, log=True)


def coming(result: Result, probe: Probe) -> list[int]:
    """Return the numbers of the steps that came next: they begin at 1, which has a logarithm."""
    return [taken + 1 for taken in result.at(probe)]


def coming_axis(plan: Plan, part: str) -> Axis:
    """Return the axis of the steps that came next."""
    return Axis("step", 1, plan.networks[part].steps + 1, log=True)


def ends(lines: Sequence[Series]) -> list[Sequence[float]]:
    """Return the ends of the bands of lines."""
    return [end for line in lines for end in (line.low, line.high)]
