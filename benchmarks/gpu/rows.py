"""The table of all layers that were measured: a row for each case and implementation."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from batchnorm.bench.cases import Case
from batchnorm.bench.rows import ratios, rounded
from benchmarks.gpu.cases import layers_like, passes
from benchmarks.gpu.contenders import BASE

#: How the work of a call gets to the device: launched by Python, or replayed as a CUDA graph.
CALL, GRAPH = "call", "graph"
#: What is said of them beside a name.
LAUNCHES = {CALL: "", GRAPH: ", as a CUDA graph"}

Kind = TypeVar("Kind")


class Entry(NamedTuple):
    """Whose time it is.

    Attributes:
        implementation: The contender.
        launch: `CALL` or `GRAPH`.
    """

    implementation: str
    launch: str


@dataclass(frozen=True)
class Row:
    """One implementation in one case; its attributes are the columns of the CSV file.

    Attributes:
        shape: The batch's, (N, C, H, W), as text.
        layers: How many layers of ResNet-50 have such an input.
        layout: The order of its dimensions in memory.
        dtype: Its type.
        mode: What is timed.
        fusion: What follows the normalization.
        implementation: Whose time it is.
        launch: Whether Python launches the work, or a CUDA graph does.
        mb: The size of the batch in MB.
        q25_us: The lower quartile of the times, in microseconds.
        median_us: Their median.
        q75_us: Their upper quartile.
        ratio: How many times the speed of `torch.nn` with the same launch: the median over rounds.
        ratio_q25: Its lower quartile.
        ratio_q75: Its upper quartile.
        copy_gb_per_s: What a large copy reads and writes in a second, just before and after.
        floor: How often the batch crosses memory where what is read twice is read from there twice.
        of_floor: The time that those passes take at copy speed, as a part of the median.
        once: How often, where it stays in a cache until it is read again.
        of_once: The time that those passes take at copy speed, as a part of the median.
        max_error: The largest error of all results, relative to the largest value of each.
        sets: How many sets of inputs took turns.
        rounds: How often each was timed.
    """

    shape: str
    layers: int
    layout: str
    dtype: str
    mode: str
    fusion: str
    implementation: str
    launch: str
    mb: float
    q25_us: float
    median_us: float
    q75_us: float
    ratio: float | None
    ratio_q25: float | None
    ratio_q75: float | None
    copy_gb_per_s: float
    floor: int
    of_floor: float
    once: int
    of_once: float
    max_error: float
    sets: int
    rounds: int


def rows(
    case: Case,
    times: Mapping[Entry, Sequence[float]],
    errors: Mapping[Entry, float],
    speed: float,
    sets: int,
) -> Iterator[Row]:
    """Yield the rows of a case.

    Args:
        case: Which.
        times: Those of each entry in seconds, a round each.
        errors: For each its largest error, relative to the largest value.
        speed: How many bytes a second a large copy reads and writes.
        sets: How many sets of inputs took turns.
    """
    problem, crossings = case.problem, passes(case.mode, case.problem.fusion)
    for entry, own in times.items():
        low, median, high = np.quantile(own, (0.25, 0.5, 0.75)).tolist()
        base = times.get(Entry(BASE.name, entry.launch))
        quartiles = None if base is None else [rounded(value) for value in ratios(base, own)]
        ratio_low, ratio, ratio_high = quartiles or (None, None, None)
        crossing = problem.mb * 1e6 / speed / median
        yield Row(
            shape=problem.size,
            layers=layers_like(case),
            layout=problem.layout,
            dtype=problem.dtype,
            mode=case.mode,
            fusion=problem.fusion,
            implementation=entry.implementation,
            launch=entry.launch,
            mb=rounded(problem.mb),
            q25_us=rounded(low * 1e6),
            median_us=rounded(median * 1e6),
            q75_us=rounded(high * 1e6),
            ratio=ratio,
            ratio_q25=ratio_low,
            ratio_q75=ratio_high,
            copy_gb_per_s=rounded(speed / 1e9),
            floor=crossings.floor,
            of_floor=rounded(crossings.floor * crossing),
            once=crossings.once,
            of_once=rounded(crossings.once * crossing),
            max_error=rounded(errors[entry], 2),
            sets=sets,
            rounds=len(own),
        )


def is_of(row: Row, case: Case) -> bool:
    """Return whether a row is of a case."""
    p = case.problem
    found = row.shape, row.layout, row.dtype, row.fusion, row.mode
    return found == (p.size, p.layout, p.dtype, p.fusion, case.mode)


def read(path: Path, kind: type[Kind]) -> list[Kind]:
    """Return the rows of a CSV file that a bench wrote; none if there is no such file.

    Args:
        path: The file.
        kind: The dataclass of its rows, whose attributes are text, numbers, or numbers or None.
    """
    if not path.exists():
        return []
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(encoding="utf-8", newline="") as file:
        return [
            kind(**{name: _value(types[name], text) for name, text in line.items()})
            for line in csv.DictReader(file)
        ]


def _value(annotation: str, text: str) -> str | int | float | None:
    if annotation == "float | None":
        return float(text) if text else None
    return {"str": str, "int": int, "float": float}[annotation](text)  # type: ignore[no-any-return]
