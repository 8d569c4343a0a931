"""What the rows come to: the figures of the first network, beside what they have to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.models.networks import FORMATS, NETWORKS
from benchmarks.models.rows import Row
from benchmarks.models.ways import (
    ACCELERATED,
    FOLDED,
    INFERENCE,
    REORDERED,
    SAVING,
    TRAINING,
    Way,
)

LAYOUTS = tuple(FORMATS)


class Figure(NamedTuple):
    """One figure.

    Attributes:
        name: Of what.
        values: For each layout, as text.
        required: What it has to be at least, or at most.
        aim: What it is meant to become.
    """

    name: str
    values: dict[str, str]
    required: str = ""
    aim: str = ""


def _speed(row: Row) -> str:
    return f"{row.ratio:.2f}x"


def _kept(row: Row) -> str:
    return "" if row.kept_ratio is None else f"{row.kept_ratio:.2f}"


def _float32(row: Row) -> str:
    return "" if row.losses_apart is None else f"{row.losses_apart:.0e} in {row.steps}"


def _float64(row: Row) -> str:
    return "" if row.losses_apart_float64 is None else f"{row.losses_apart_float64:.0e}"


#: Name, way, mode, value, required, aim.
_FIGURES: tuple[tuple[str, Way, str, Callable[[Row], str], str, str], ...] = (
    ("training step, accelerated, times the speed of stock", ACCELERATED, TRAINING, _speed, "1.25x",
     "1.4x"),
    ("kept with `save_memory`, against stock", SAVING, TRAINING, _kept, "0.65", "0.55"),
    ("training step with `save_memory`, times the speed of stock", SAVING, TRAINING, _speed, "1x",
     "1.2x"),
    ("inference, folded, times the speed of stock", FOLDED, INFERENCE, _speed, "1.2x", "1.3x"),
    ("losses apart from stock's, steps in float32: accelerated", ACCELERATED, TRAINING, _float32,
     "rounding", ""),
    ("the same: stock, the images in another order", REORDERED, TRAINING, _float32, "", ""),
    ("losses apart from stock's in float64: accelerated", ACCELERATED, TRAINING, _float64,
     "rounding", ""),
)  # fmt: skip


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures that the rows have; nothing where the network is not among them."""
    title = next(iter(NETWORKS.values())).title
    found = []
    for name, way, mode, value, required, aim in _FIGURES:
        values = {
            row.layout: value(row)
            for row in rows
            if row.network == title and row.way == way.name and row.mode == mode
        }
        if values:
            found.append(Figure(name, values, required, aim))
    return found
