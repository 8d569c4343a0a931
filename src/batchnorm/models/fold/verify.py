"""Whether a folded model answers as the one before, and which layers are to blame if not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from batchnorm.models.compare import largest_error
from batchnorm.models.fold.plan import Plan


class Attempt(NamedTuple):
    """What came of a plan.

    Attributes:
        plan: What was folded.
        error: The largest error.
        failure: What came in place of an output to compare, if something did.
    """

    plan: Plan
    error: float = math.inf
    failure: str = ""


def measured(plan: Plan, expected: Any, run: Callable[[], Any]) -> Attempt:
    """Return a plan with its error.

    Args:
        plan: The plan.
        expected: What the model returned before.
        run: Returns what one returns that is folded so.
    """
    try:
        return Attempt(plan, largest_error(expected, run()))
    except Exception as error:  # of any kind: what was taken out of a model may be missed anywhere
        reason = (str(error).strip() or "no message").splitlines()[0]
        return Attempt(plan, failure=f"the model raises {type(error).__name__}: {reason}")


def settle(
    names: Sequence[str], attempt: Callable[[Sequence[str]], Attempt], tol: float
) -> tuple[Attempt, dict[str, str]]:
    """Return what can be folded within the error, and why other layers cannot.

    Where all of them together cannot be, halves are tried, on top of what was found good.

    Args:
        names: The layers to fold.
        attempt: Folds some of them.
        tol: How large the error may be.

    Raises:
        ValueError: It is larger where nothing is folded.
    """
    kept: list[str] = []
    left: dict[str, str] = {}
    good: Attempt | None = None

    def add(part: Sequence[str]) -> None:
        nonlocal good
        found = attempt([*kept, *part])
        if found.error <= tol:
            good = found
            kept.extend(part)
        elif len(part) == 1:
            left[part[0]] = "with it folded, " + (
                found.failure or f"the largest error is {found.error:.1e}, and tol is {tol:.0e}"
            )
        elif part:
            add(part[: len(part) // 2])
            add(part[len(part) // 2 :])

    add(names)
    if good is None:
        good = attempt(())
        if not good.error <= tol:
            said = good.failure or f"its largest error is {good.error:.1e}, and tol is {tol:.0e}"
            raise ValueError(
                f"a copy of the model with nothing folded does not answer the same: {said}; seed "
                "what it draws (numbers of torch are seeded), or pass verify=False"
            )
    return good, left
