"""Measures case by case: first whether all are right, then how long they take."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from batchnorm.bench.cases import Case
from batchnorm.bench.check import check
from batchnorm.bench.contenders import contenders
from batchnorm.bench.harness import alternate, threads
from batchnorm.bench.problem import Posed, pose


class Taken(NamedTuple):
    """What was measured of a case.

    Attributes:
        case: Which.
        times: For each implementation its times in seconds, a round each.
        errors: For each its largest error, relative to the largest value.
    """

    case: Case
    times: dict[str, list[float]]
    errors: dict[str, float]


def measure(
    cases: Iterable[Case], seconds: float, left_out: Collection[str] = ()
) -> Iterator[Taken]:
    """Yield what is measured of each case.

    Args:
        cases: What is measured, those of the same problem beside each other.
        seconds: How long each is timed; there are at least five rounds.
        left_out: The implementations that cannot take part.

    Raises:
        WrongResult: A contender is wrong.
    """
    for problem, alike in groupby(cases, lambda case: case.problem):
        group = list(alike)
        posed = pose(problem, {case.mode for case in group})
        for case in group:
            with threads(case.threads):
                yield _measure(case, posed, seconds, left_out)


def _measure(case: Case, posed: Posed, seconds: float, left_out: Collection[str]) -> Taken:
    calls, errors = {}, {}
    for contender in contenders(case):
        name = contender.name
        if name not in left_out:
            step = contender.step(case, posed)
            found = step.read(step.call())
            errors[name] = check(
                name, contender.ours, case.problem, found, step.answers or posed.answers[case.mode]
            )
            calls[name] = step.call
            del found  # its memory can be used again
    return Taken(case, alternate(calls, seconds), errors)
