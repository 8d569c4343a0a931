"""The two phases of a run: a plateau, where it hardly learns yet, and what comes after."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.study.measures.runs import NotMeasured
from batchnorm.study.observation import Probe, Result
from batchnorm.study.plan import Plan

LEARNING = 0.9  # of the loss at the start, or of guessing: below that, a network begins to learn


def begun(result: Result, plan: Plan) -> int:
    """Return after how many steps the loss of a batch shows that a network has begun to learn.

    It is below 90% of the first one, and of the loss of guessing among classes that are as frequent
    as the most frequent one: where a network starts worse than by guessing, its loss falls to a
    plateau there, with nothing learned.

    Raises:
        NotMeasured: It never is.
    """
    enough = LEARNING * min(result.losses[0], -math.log(plan.chance))
    for taken, loss in enumerate(result.losses):
        if loss < enough:
            return taken
    raise NotMeasured(f"A network did not begin to learn in {len(result.losses)} steps.")


def before(result: Result, plan: Plan, probe: Probe, values: Sequence[float]) -> list[float]:
    """Return the values of the looks of a probe before the network begins to learn."""
    start = begun(result, plan)
    return [value for at, value in zip(result.at(probe), values, strict=True) if at < start]


def learning(result: Result, plan: Plan, probe: Probe, values: Sequence[float]) -> list[float]:
    """Return the values of the looks of a probe from then on; the last look always is one."""
    start = begun(result, plan)
    return [value for at, value in zip(result.at(probe), values, strict=True) if at >= start]
