"""What fits into the time that a study may take, and what is left out."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch

from batchnorm.study.claims import Claim
from batchnorm.study.data import DataSet
from batchnorm.study.descent import batches, evaluate, one_thread, some, step
from batchnorm.study.networks import Network, build
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.tasks import Outcome, StudyError, Task

_EVALUATIONS = 0.15  # a step, in a run of a few hundred
_TIMED = 8  # steps of training by which the pace of a network is told
_BESIDE = 25.0  # seconds for what is not training: imports, workers, the report
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Chosen:
    """What of a claim is done.

    Attributes:
        claim: The claim.
        parts: The parts that are done.
        left_out: The parts that there is no time for.
    """

    claim: Claim
    parts: Sequence[str]
    left_out: Sequence[str] = ()

    def tasks(self, plan: Plan) -> list[Task[Any]]:
        """Return what must be done first."""
        return [task for part in self.parts for task in self.claim.tasks(plan, part)]


@dataclass(frozen=True, kw_only=True)
class Seconds(Outcome):
    """How long a step of training takes.

    Attributes:
        step: Seconds, the shortest of a few, with a step's share of the evaluations.
    """

    step: float = 0.0


@dataclass(frozen=True)
class Pace(Task[Seconds]):
    """The time of a step of a normalized network, by which the time of a study is estimated.

    Attributes:
        network: The network.
    """

    kind = "pace"
    outcome = Seconds
    alone = True

    network: Network

    def perform(self, data_set: DataSet) -> Seconds:
        """Take a few steps."""
        times = []
        with one_thread():
            model = build(self.network, NORMALIZED, data_set.shape, data_set.classes, seed=0)
            for x, y in islice(batches(data_set, 60, seed=0), _TIMED):
                start = time.perf_counter()
                step(model, x, y, self.network.usual_rate)
                times.append(time.perf_counter() - start)
            held_out = some(data_set.test_inputs, data_set.test_labels, torch.float32)
            start = time.perf_counter()
            evaluate(model, *held_out)
            evaluation = time.perf_counter() - start
        return Seconds(step=min(times) + _EVALUATIONS * evaluation)

    def __str__(self) -> str:
        return f"pace of {self.network.name}"


def seconds(text: str) -> float:
    """Return the seconds of a budget.

    Args:
        text: A number with its unit, s, m or h, or `full`.

    Raises:
        StudyError: It is neither.

    Example:
        >>> seconds("90s"), seconds("1.5m"), seconds("full")
        (90.0, 90.0, inf)
    """
    if text == "full":
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise StudyError(f"--budget {text}: expected a time as 90s, 3m or 1h, or full")
    return float(match[1]) * _UNITS[match[2]]


def choose(
    claims: Sequence[Claim],
    plan: Plan,
    paces: Mapping[str, float],
    budget: float,
    jobs: int,
    done: Container[Task[Any]] = (),
) -> list[Chosen]:
    """Choose what fits: the first part of every claim, then the second of every claim, and so on.

    A part costs only the tasks that no part before it needs. A part that does not fit is left out,
    and the next one is tried.

    Args:
        claims: The claims that are asked for.
        plan: What the runs are made from.
        paces: The seconds of a step of training, by the name of the network.
        budget: The seconds that the study may take.
        jobs: How many tasks are done at a time.
        done: The tasks that cost nothing, as they are done already.

    Returns:
        What is done of each claim.
    """
    planned: set[Task[Any]] = set()
    spent = _BESIDE
    parts: dict[str, list[str]] = {claim.name: [] for claim in claims}
    left_out: dict[str, list[str]] = {claim.name: [] for claim in claims}
    for claim, part in _in_turn(claims, plan):
        new = {task for task in claim.tasks(plan, part) if task not in planned and task not in done}
        longer = sum(task.seconds(paces) / (1 if task.alone else jobs) for task in new)
        fits = spent + longer <= budget
        (parts if fits else left_out)[claim.name].append(part)
        if fits:
            planned |= new
            spent += longer
    return [Chosen(claim, parts[claim.name], left_out[claim.name]) for claim in claims]


def parts_of(claim: Claim, plan: Plan) -> list[str]:
    """Return the parts of a claim: its own, and the networks that a user brings."""
    return list(dict.fromkeys([*claim.parts, *(plan.brought if claim.any_network else ())]))


def _in_turn(claims: Sequence[Claim], plan: Plan) -> Iterator[tuple[Claim, str]]:
    for turn in zip_longest(*(parts_of(claim, plan) for claim in claims)):
        for claim, part in zip(claims, turn, strict=True):
            if part is not None:
                yield claim, part
