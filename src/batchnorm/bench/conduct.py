"""A whole bench, from what was asked for to the files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from batchnorm.bench.cases import Case, Wanted, plan
from batchnorm.bench.contenders import PEERS, contenders
from batchnorm.bench.errors import BenchError
from batchnorm.bench.harness import copy_speed, threads
from batchnorm.bench.measure import Taken, measure
from batchnorm.bench.picture import png
from batchnorm.bench.rows import Row, rows
from batchnorm.bench.save import check_folder, save
from batchnorm.bench.tables import terminal
from batchnorm.environment import describe

#: How long each case is timed, in seconds, and in a quick bench.
SECONDS, QUICK_SECONDS = 0.2, 0.1

#: How much of a machine may be at work on other things, before that is said.
_BUSY = 0.5


def conduct(
    wanted: Wanted, folder: Path, *, console: Console, seconds: float | None = None
) -> list[Row]:
    """Check and time all cases, show the tables, write the files.

    Args:
        wanted: What is to be measured.
        folder: Where the files go.
        console: Where progress and tables are shown.
        seconds: How long each case is timed.

    Returns:
        All rows.

    Raises:
        BenchError: What was asked for cannot be had.
        WrongResult: A contender computes something else.
    """
    check_folder(folder)
    if seconds is None:
        seconds = QUICK_SECONDS if wanted.quick else SECONDS
    cases = plan(wanted, torch.get_num_threads())
    left_out = _left_out(cases, wanted)
    for name, reason in left_out.items():
        console.print(f"{name} is left out: {reason}", markup=False, highlight=False)
    load = say_if_busy(console)
    counts = sorted({case.threads for case in cases})
    before = _copy_speeds(counts)
    taken = _measured(cases, seconds, left_out, console)
    after = _copy_speeds(counts)
    speeds = {count: (before[count] + after[count]) / 2 for count in counts}
    measured = rows(taken, speeds)
    made_on = {
        **describe(),
        "jax": importlib.metadata.version("jax") if importlib.util.find_spec("jax") else "none",
        "load": round(load, 2),
        "seconds": seconds,
        "left_out": left_out,
        "copy_gb_per_s": {
            str(n): {"start": round(before[n] / 1e9, 2), "end": round(after[n] / 1e9, 2)}
            for n in counts
        },
    }
    console.print(terminal(measured))
    files = save(folder, measured, made_on, png(measured))
    listed = ", ".join(
        f"{speed / 1e9:.1f} GB/s on {count} thread{'s' if count > 1 else ''}"
        for count, speed in speeds.items()
    )
    console.print(f"A large copy, bytes read and written: {listed}.", highlight=False)
    console.print(f"All rows: {files[0]}", markup=False, soft_wrap=True, highlight=False)
    return measured


def _left_out(cases: Iterable[Case], wanted: Wanted) -> dict[str, str]:
    """Return the contenders that are not there, with the reasons.

    Raises:
        BenchError: One of them was asked for by name.
    """
    there = {contender.name: contender for case in cases for contender in contenders(case)}
    found = {name: c.missing() for name, c in there.items()}
    missing = {name: reason for name, reason in found.items() if reason is not None}
    for asked in wanted.peers or ():
        name = PEERS[asked].name if asked in PEERS else asked
        if name in missing:
            raise BenchError(f"--peers {asked}: {missing[name]}")
    return missing


def say_if_busy(console: Console) -> float:
    """Say if other programs are at work on this machine, and return how many there are.

    Args:
        console: Where it is said.
    """
    load, cores = _load(), os.cpu_count() or 1
    if load > _BUSY * cores:
        console.print(
            f"This machine is busy: {load:.1f} processes on {cores} cores over the last minute. "
            "Times will be off, most of all those of small batches.",
            highlight=False,
        )
    return load


def _load() -> float:
    """Return how many processes wanted to run over the last minute; 0 where that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _copy_speeds(counts: Iterable[int]) -> dict[int, float]:
    found = {}
    for count in counts:
        with threads(count):
            found[count] = copy_speed()
    return found


def shown_on(console: Console) -> Progress:
    """Return what shows how far a bench is, on a terminal, and only when it is told to.

    Args:
        console: Where it is shown.
    """
    return Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        console=console,
        auto_refresh=False,  # which would take time from what is timed
        disable=not console.is_terminal,
        transient=True,
    )


def _measured(
    cases: list[Case], seconds: float, left_out: Mapping[str, str], console: Console
) -> list[Taken]:
    """Measure all cases, and show which one is at work."""
    done = []
    with shown_on(console) as progress:
        bar = progress.add_task(str(cases[0]), total=len(cases))
        for taken in measure(cases, seconds, left_out):
            done.append(taken)
            following = str(cases[len(done)]) if len(done) < len(cases) else ""
            progress.update(bar, advance=1, description=following, refresh=True)
    return done
