"""How a benchmark is measured: correct first, then beside its peers, in turn, by quantiles."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from batchnorm.environment import describe

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def alternate(calls: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Return the times of every call, in seconds, taken in turn until the budget is used up.

    In turn, because the speed of a machine drifts: what stands beside each other was measured at
    the same moment. The first round warms up and is not counted; there are at least five others.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def rows(case: Row, times: dict[str, list[float]], peer: str) -> Iterable[Row]:
    """Yield a row for each call: quantiles in microseconds, and its speed against a peer's.

    The ratio is the median over the rounds of peer's time / own time: over 1 is faster.
    """
    for name, own in times.items():
        low, median, high = np.quantile(own, [0.25, 0.5, 0.75]) * 1e6
        ratio = float(np.median(np.divide(times[peer], own)))
        yield {
            **case,
            "implementation": name,
            "q25_us": round(low, 1),
            "median_us": round(median, 1),
            "q75_us": round(high, 1),
            f"speed_against_{peer}": round(ratio, 3),
            "rounds": len(own),
        }


def save(name: str, measured: list[Row]) -> None:
    """Write the rows as CSV, and beside them what they were measured on, each whole."""
    RESULTS.mkdir(exist_ok=True)
    table = RESULTS / f"{name}.csv"
    partial = table.with_suffix(".tmp")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, measured[0])
        writer.writeheader()
        writer.writerows(measured)
    partial.replace(table)
    partial.write_text(json.dumps(describe(), indent=2) + "\n", encoding="utf-8")
    partial.replace(RESULTS / f"{name}.json")


def show(title: str, measured: list[Row], columns: list[str]) -> None:
    """Print the rows as a table."""
    table = Table(title=title, caption=", ".join(f"{k} {v}" for k, v in describe().items()))
    for column in columns:
        table.add_column(
            column, justify="left" if isinstance(measured[0][column], str) else "right"
        )
    for row in measured:
        table.add_row(
            *(f"{row[c]:g}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        )
    Console().print(table)
