"""What all the rows come to: a few figures, with what they have to be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from batchnorm.bench.cases import BOTH, RELU, RESIDUAL
from benchmarks.gpu.cases import COUNTS, LAYOUTS
from benchmarks.gpu.contenders import BASE, OURS, PEERS
from benchmarks.gpu.models import LAYOUT
from benchmarks.gpu.rows import LAUNCHES, Row
from benchmarks.models.measure import Row as ModelRow
from benchmarks.models.ways import ACCELERATED, SAVING

_SHARE = "share of the speed of a large copy, BN + add + ReLU"


class Figure(NamedTuple):
    """One figure.

    Attributes:
        name: Of what.
        must: What it has to be at least, or of memory at most.
        aim: What it is meant to become.
        values: As text, by layout.
    """

    name: str
    must: str
    aim: str
    values: dict[str, str]


def figures(rows: Sequence[Row], models: Sequence[ModelRow]) -> list[Figure]:
    """Return the figures that were measured, forward and backward, of the first type.

    Means are geometric, over the layers of ResNet-50: a shape counts as often as it has layers.

    Args:
        rows: Those of the layers.
        models: Those of the models.
    """
    main = [row for row in rows if row.mode == BOTH and row.dtype == rows[0].dtype]
    found = []
    for launch, how in LAUNCHES.items():
        share = _by_layout(
            [(row, row.of_floor) for row in rows_of(main, RESIDUAL, launch)], "{:.2f}"
        )
        found.append(Figure(f"{_SHARE}{how}", "0.85", "1.0", share))
    for name, must, aim in (
        (BASE.name, "2x", "3x"),
        (PEERS["compile"].name, "1.2x", "1.5x"),
        (PEERS["jax"].name, "", ""),
    ):
        for launch, how in LAUNCHES.items():
            values = _by_layout(_against(main, name, launch), "{:.2f}x")
            found.append(Figure(f"times the speed of `{name}`, BN + ReLU{how}", must, aim, values))
    ways = {row.way: row for row in models}
    if ACCELERATED.name in ways:
        value = f"{ways[ACCELERATED.name].ratio:.2f}x"
        name = "training step of ResNet-50, accelerated, times the speed of the model as it is"
        found.append(Figure(name, "1.2x", "1.35x", {LAYOUT: value}))
    if SAVING.name in ways and ways[SAVING.name].peak is not None:
        value = f"{ways[SAVING.name].peak:.2f}"
        name = "peak memory of that with `save_memory`, of the model's as it is"
        found.append(Figure(name, "0.7", "0.6", {LAYOUT: value}))
    return [figure for figure in found if figure.values]


def rows_of(rows: Sequence[Row], fusion: str, launch: str, name: str = OURS.name) -> list[Row]:
    """Return the rows of a contender.

    Args:
        rows: Where they are looked for.
        fusion: What follows the normalization.
        launch: How the work gets to the device.
        name: The contender.
    """
    return [r for r in rows if (r.fusion, r.launch, r.implementation) == (fusion, launch, name)]


def _against(rows: Sequence[Row], name: str, launch: str) -> list[tuple[Row, float]]:
    """Return our rows of BN + ReLU, and how many times the speed of another each has."""
    theirs = {(r.shape, r.layout): r.ratio for r in rows_of(rows, RELU, launch, name)}
    return [
        (row, row.ratio / other)
        for row in rows_of(rows, RELU, launch)
        if row.ratio is not None and (other := theirs.get((row.shape, row.layout))) is not None
    ]


def _by_layout(values: Iterable[tuple[Row, float]], form: str) -> dict[str, str]:
    """Return the mean for each layout, with the number of layers where those are not all."""
    pairs = list(values)
    found = {}
    for layout in LAYOUTS:
        own = [(value, row.layers) for row, value in pairs if row.layout == layout]
        if own:
            layers = sum(count for _, count in own)
            part = "" if layers == COUNTS.total() else f" ({layers} of {COUNTS.total()} layers)"
            found[layout] = form.format(weighted(own)) + part
    return found


def weighted(values: Sequence[tuple[float, int]]) -> float:
    """Return the geometric mean of values that count so often.

    Args:
        values: Each with its weight.

    Example:
        >>> weighted([(2.0, 3), (32.0, 1)])
        4.0
    """
    total = sum(weight for _, weight in values)
    return 2 ** (sum(weight * math.log2(value) for value, weight in values) / total)
