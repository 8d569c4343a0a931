"""What all the rows come to: a few figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from batchnorm.bench.cases import BOTH, DTYPES, LARGE_MB, RELU
from batchnorm.bench.contenders import BASE, GHOST, MAPPED, NATIVE
from batchnorm.bench.rows import Row


class Figure(NamedTuple):
    """One figure.

    Attributes:
        name: Of what.
        value: As text, with its unit.
        required: What it has to be at least, or at most.
        aim: What it is meant to become.
    """

    name: str
    value: str
    required: str = ""
    aim: str = ""


#: Required, and the aim, by how a figure's name begins.
_WANTED = {
    f"times the speed of `{BASE.name}`, over": ("5x", "8x"),
    f"times the speed of `{BASE.name}`, 1 to": ("2x", "3x"),
    "times the speed of `torch.compile`": ("5x", "8x"),
    "times the speed of `jax`": ("5x", "8x"),
    "time against the floor": ("1.15", "1.05"),
    "time in bfloat16": ("0.6", "0.52"),
    f"time of `{GHOST.name}`": ("1.05", ""),
    "slowest": ("1x", "1.3x"),
    "largest error in float32": ("1e-06", "3e-07"),
}


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures that the rows have; all but two are of BN + ReLU, forward and backward.

    Means over several shapes and layouts are geometric.
    """
    most = max(row.threads for row in rows)
    main = [r for r in rows if r.mode == BOTH and r.fusion == RELU and r.threads == most]
    single = [row for row in main if row.dtype == DTYPES[0]]
    native = [row for row in single if row.implementation == NATIVE.name]
    large = [row for row in native if row.mb > LARGE_MB]
    sizes = {
        f"over {LARGE_MB} MB": large,
        f"1 to {LARGE_MB} MB": [row for row in native if 1 <= row.mb <= LARGE_MB],
        "under 1 MB": [row for row in native if row.mb < 1],
    }
    found = [
        (f"times the speed of `{BASE.name}`, {size}", _times(row.ratio for row in chosen))
        for size, chosen in sizes.items()
    ]
    for name in ("torch.compile", "jax"):
        pairs = _pairs(large, [row for row in single if row.implementation == name])
        against = _times(own.ratio / theirs.ratio for own, theirs in pairs)
        found.append((f"times the speed of `{name}`, over {LARGE_MB} MB", against))
    mapped = [r for r in single if r.implementation == MAPPED.name and r.mb > LARGE_MB]
    floor = mean(1 / row.of_floor for row in mapped)
    found.append((f"time against the floor, memory mapped, over {LARGE_MB} MB", _number(floor)))
    halves = [
        row
        for row in main
        if row.implementation == NATIVE.name and row.dtype == DTYPES[1] and row.mb > LARGE_MB
    ]
    times = mean(half.median_us / row.median_us for row, half in _pairs(large, halves))
    found.append((f"time in bfloat16 against float32, both over {LARGE_MB} MB", _number(times)))
    ghosts = [row for row in single if row.implementation == GHOST.name]
    costs = [(own.ratio / ghost.ratio, ghost) for own, ghost in _pairs(native, ghosts)]
    name = f"time of `{GHOST.name}` against `{NATIVE.name}`"
    found.append((f"{name}, mean of {len(costs)}", _number(mean(part for part, _ in costs))))
    if costs:
        part, most_costly = max(costs, key=lambda pair: pair[0])
        found.append((f"{name}, slowest: {most_costly.shape} {most_costly.layout}", _number(part)))
    everything = [row for row in rows if row.implementation == NATIVE.name]
    if everything:
        slowest = min(everything, key=lambda row: row.ratio)
        name = f"slowest of all {len(everything)} cases: {slowest.label}"
        found.append((name, _times([slowest.ratio])))
    for dtype in DTYPES:
        errors = [row.max_error for row in everything if row.dtype == dtype]
        worst = f"{max(errors):.1e}" if errors else ""
        found.append((f"largest error in {dtype}, of the largest value", worst))
    return [Figure(name, value, *_wanted(name)) for name, value in found if value]


def _wanted(name: str) -> tuple[str, str]:
    return next((w for start, w in _WANTED.items() if name.startswith(start)), ("", ""))


def mean(values: Iterable[float]) -> float:
    """Return the geometric mean; NaN of nothing.

    Example:
        >>> mean([2.0, 8.0])
        4.0
    """
    logarithms = [math.log2(value) for value in values]
    return 2 ** (sum(logarithms) / len(logarithms)) if logarithms else math.nan


def _pairs(some: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the rows of the same shape and layout."""
    found = {(row.shape, row.layout): row for row in others}
    return [(row, found[key]) for row in some if (key := (row.shape, row.layout)) in found]


def _times(values: Iterable[float]) -> str:
    value = mean(values)
    return "" if math.isnan(value) else f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
