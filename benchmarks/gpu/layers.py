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
    """

    rows: list[Row]
    failed: dict[str, str]


def measure(
    case: Case, peers: Mapping[str, Contender], device: torch.device, effort: Effort
) -> Measured:
    """Check and time all contenders of a case: first their calls, then these as CUDA graphs.

    One that is wrong, or cannot do it, is not timed; the others are.

    Args:
        case: The case.
        peers: Who takes part beside `torch.nn` and ours.
        device: Where.
        effort: How thoroughly.
    """
    posed = pose(case, device)
    sets = copies(posed, case.mode, effort.cache)
    errors: dict[Entry, float] = {}
    failed: dict[str, str] = {}
    times: dict[Entry, list[float]] = {}
    steps: dict[Contender, list[Step]] = {}
    before = copy_speed(device)
    for launch in (CALL, GRAPH) if device.type == "cuda" else (CALL,):
        timed: dict[Entry, Timed] = {}
        for contender in (BASE, OURS, *peers.values()):
            if launch == GRAPH and (contender not in steps or not contender.is_captured):
                continue
            entry = Entry(contender.name, launch)
            try:
                if launch == CALL:
                    made = contender.steps(case, sets)
                else:
                    made = [captured(step) for step in steps[contender]]
                errors[entry] = _checked(entry, contender, case, made[0], posed)
                _warm_up(made)
            except Exception as error:  # of another's compiler, say: the others are measured yet
                failed[f"{contender.name}{LAUNCHES[launch]}"] = said(error)
            else:
                steps.setdefault(contender, made)
                timed[entry] = Timed([step.call for step in made], contender.is_on_stream)
        times |= alternate(timed, device, effort.seconds, effort.rounds)
    speed = (before + copy_speed(device)) / 2
    return Measured(list(rows(case, times, errors, speed, len(sets))), failed)


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
