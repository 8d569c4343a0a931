"""The worked examples of the notes: what computes them, and what is drawn and listed of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.study.charts import Axis, Panel, Series
from batchnorm.study.claims.claim import Row
from batchnorm.study.data import DataSet
from batchnorm.study.measures.implementations import NORMALIZE, furthest
from batchnorm.study.measures.runs import whole
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.tasks import Outcome, Task

BATCH = (3, 5, 8, 9, 11, 24)
SMALL, LARGE = (2, 0, 2, 4), (200, 0, 200, 400)
GAMMA, BETA = 3.0, 1.0  # any would do
EPS = (1e-2, 1e-5, 1e-8, 1e-12)
TOLERANCE = 1e-9  # with the smallest eps; float64 rounds at 1e-16

_LIMIT = (BETA, BETA - math.sqrt(2) * GAMMA, BETA, BETA + math.sqrt(2) * GAMMA)
_FLOOR = 1e-16  # where no distance is drawn, as a logarithm has no 0


@dataclass(frozen=True, kw_only=True)
class Worked(Outcome):
    """What came of the worked examples.

    Attributes:
        mean: Of the first example.
        variance: Of the first example.
        normalized: By the implementation, the first example's values.
        distances: By the implementation, how far [2, 0, 2, 4] and [200, 0, 200, 400] are from the
            limit: one pair for each eps.
    """

    mean: float = 0.0
    variance: float = 0.0
    normalized: Mapping[str, list[float]] = field(default_factory=dict)
    distances: Mapping[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkedExamples(Task[Worked]):
    """The worked examples, in float64, by every implementation."""

    kind = "worked examples"
    outcome = Worked

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes."""
        return 0.05

    def perform(self, data_set: DataSet) -> Worked:
        """Work them."""
        found = reference.moments(_column(BATCH).numpy())
        one, none, gamma, beta = (torch.tensor([value]) for value in (1.0, 0.0, GAMMA, BETA))
        limit = _column(_LIMIT)
        return Worked(
            mean=float(found.mean[0]),
            variance=float(found.var()[0]),
            normalized={
                name: normalize(_column(BATCH), one, none).flatten().tolist()
                for name, normalize in NORMALIZE.items()
            },
            distances={
                name: [
                    [
                        furthest(normalize(_column(x), gamma, beta, eps), limit)
                        for x in (SMALL, LARGE)
                    ]
                    for eps in EPS
                ]
                for name, normalize in NORMALIZE.items()
            },
        )

    def __str__(self) -> str:
        return "worked examples"


def _column(values: Sequence[float]) -> Tensor:
    """A batch of one feature."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def worked(plan: Plan, store: Store) -> Worked:
    """Return what came of the examples.

    Raises:
        NotMeasured: They broke off.
    """
    return whole(store, [WorkedExamples(plan.data)])[0]


def furthest_from_limit(outcome: Worked) -> float:
    """Return how far any implementation is from the limit, with the smallest eps."""
    return max(distance for pairs in outcome.distances.values() for distance in pairs[-1])


def limit_rows(outcome: Worked) -> list[Row]:
    """Return how far each implementation is from the limit, for each eps."""
    every = ", ".join(f"{eps:g}" for eps in EPS)
    return [
        Row(name, f"distance of {list(x)} from the limit, ε = {every}", distances)
        for name, pairs in outcome.distances.items()
        for x, distances in zip((SMALL, LARGE), zip(*pairs, strict=True), strict=True)
    ]


def limit_panel(outcome: Worked) -> Panel:
    """Draw how eps keeps the small and the large values from the limit."""
    lines = [
        Series(style, EPS[::-1], [max(distance, _FLOOR) for distance in of[::-1]], name=name)
        for style, name, of in zip(
            ("other", "batchnorm"),
            ("2, 0, 2, 4", "200, 0, 200, 400"),
            zip(*outcome.distances["batchnorm"], strict=True),
            strict=True,
        )
    ]
    ticks = [(10.0**power, f"1e{power}") for power in range(-16, 1, 4)]
    return Panel(
        "the second example",
        Axis("ε", EPS[-1], EPS[0], log=True, ticks=[(eps, f"{eps:g}") for eps in EPS]),
        Axis("distance from the limit", _FLOOR, 1.0, log=True, ticks=ticks),
        lines,
    )
