"""Measures a case: first whether all are right, then how long they take."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from batchnorm.bench.cases import Case
from batchnorm.bench.contenders import Step
from batchnorm.bench.problem import Posed
from benchmarks.gpu.clock import WARMUP, Timed, alternate, captured, copy_speed
from benchmarks.gpu.contenders import BASE, OURS, Contender
from benchmarks.gpu.posing import check, copies, pose
from benchmarks.gpu.rows import CALL, GRAPH, LAUNCHES, Entry, Row, rows


class Effort(NamedTuple):
    """How thoroughly is measured.

    Attributes:
        seconds: How long a case is timed at least.
        rounds: How often each is timed at least.
        cache: The bytes of the last cache, which inputs are to be larger than.
    """

    seconds: float
    rounds: int
    cache: int


class Measured(NamedTuple):
    """What came of a case.

    Attributes:
        rows: One for each that was timed.
        failed: Who was not, and why.
        uncaptured: Who could not be captured in a CUDA graph, and why.
    """

    rows: list[Row]
    failed: dict[str, str]
    uncaptured: dict[str, str]


def measure(
    case: Case, peers: Mapping[str, Contender], device: torch.device, effort: Effort
) -> Measured:
    """Check and time all contenders of a case: first their calls, then these in CUDA graphs.

    One that is wrong, or cannot do it, is not timed; the others are.

    Args:
        case: The case.
        peers: Who takes part beside `torch.nn` and ours.
        device: Where.
        effort: How thoroughly.
    """
    posed = pose(case, device)
    sets = copies(posed, case.mode, effort.cache)
    found = Measured([], {}, {})
    errors: dict[Entry, float] = {}
    before = copy_speed(device)
    calls: dict[Entry, Timed] = {}
    capturable: dict[Contender, list[Step]] = {}
    for contender in (BASE, OURS, *peers.values()):
        entry = Entry(contender.name, CALL)
        try:
            steps = contender.steps(case, sets)
            errors[entry] = _checked(entry, contender, case, steps[0], posed)
            _warm_up(steps)
        except Exception as error:  # of another's compiler, say: the others are measured yet
            found.failed[contender.name] = said(error)
            continue
        calls[entry] = Timed([step.call for step in steps], contender.is_on_stream)
        if contender.is_captured and device.type == "cuda":
            capturable[contender] = steps
    times = alternate(calls, device, effort.seconds, effort.rounds)
    graphs: dict[Entry, Timed] = {}
    for contender, steps in capturable.items():
        entry = Entry(contender.name, GRAPH)
        try:
            graph = captured(steps)
            errors[entry] = _checked(entry, contender, case, graph, posed)
            _warm_up([graph])
        except Exception as error:  # the calls have been timed
            found.uncaptured[contender.name] = said(error)
            continue
        graphs[entry] = Timed([graph.call], parts=len(steps))
    if graphs:
        times |= alternate(graphs, device, effort.seconds, effort.rounds)
    speed = (before + copy_speed(device)) / 2
    found.rows.extend(rows(case, times, errors, speed, len(sets)))
    return found


def _checked(entry: Entry, contender: Contender, case: Case, step: Step, posed: Posed) -> float:
    """Return the largest error of what a step returns."""
    found = step.read(step.call())
    name = f"{entry.implementation}{LAUNCHES[entry.launch]}"
    return check(name, contender.ours, case, found, posed)


def _warm_up(steps: Sequence[Step]) -> None:
    for step in steps:
        for _ in range(WARMUP):
            step.call()


def free(device: torch.device) -> None:
    """Give back the memory of what was measured.

    Args:
        device: Where it lies.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def said(error: Exception) -> str:
    """Return what an error says, in one line.

    Args:
        error: What was raised.
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'it says nothing'}"[:300]
