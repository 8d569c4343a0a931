"""Whether a contender is right: no time is taken of what is not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.bench.cases import Problem
from batchnorm.bench.errors import WrongResult
from batchnorm.bench.harness import threads
from batchnorm.bench.problem import Answer

#: Largest error allowed, relative to the largest value: of ours, and of the peers. Ours is rounded
#: to the type once. The sums of `torch.nn` over a batch with the channels last lose three digits of
#: float32; in bfloat16 it rounds between its steps. A wrong formula is off by more than that.
BOUNDS = {
    "float32": {True: 1e-6, False: 2e-3},
    "bfloat16": {True: 2**-8 * (1 + 2**-6), False: 2**-6},
}
_NAMES = ("y", "dx", "dweight", "dbias", "dresidual")
_PIECE = 2**15


def check(
    name: str, ours: bool, problem: Problem, found: Sequence[Tensor], answers: Sequence[Answer]
) -> float:
    """Return the largest error of all results, relative to the largest value of each.

    Args:
        name: Whose they are.
        ours: Whether the narrow bound holds for them.
        problem: What was computed.
        found: The results.
        answers: What they should be.

    Raises:
        WrongResult: One is off by more than the bound, or not a number.
    """
    bound = BOUNDS[problem.dtype][ours]
    errors = [relative_error(*pair) for pair in zip(found, answers, strict=True)]
    for what, error in zip(_NAMES, errors, strict=False):
        if not error <= bound:
            raise WrongResult(
                f"{name} is wrong: its {what} is off by {error:.2g} of the largest value, at most "
                f"{bound:.2g} is allowed ({problem.size} {problem.layout}, {problem.dtype}, "
                f"{problem.fusion}); no time is taken of it"
            )
    return max(errors)


def relative_error(found: Tensor, answer: Answer) -> float:
    """Return the largest error relative to the largest value expected; NaN where there is one.

    Raises:
        WrongResult: The shapes differ.
    """
    expected = answer.values
    if found.shape != expected.shape:
        raise WrongResult(f"a result has the shape {tuple(found.shape)}, not {expected.shape}")
    buffer = torch.empty(_PIECE, dtype=torch.float64)
    errors = []
    with threads(1):  # pieces that stay in the cache are too small to be shared
        for part, wanted in zip(_pieces(found, expected), _pieces(expected, expected), strict=True):
            error = buffer[: len(part)].copy_(part).sub_(wanted)
            errors.append(torch.linalg.vector_norm(error, math.inf))
        return float(torch.stack(errors).max() / answer.largest)


def _pieces(values: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Return pieces of a tensor, in the order that another has in memory."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: -strides[d])
    flat = values.detach().permute(order).reshape(-1)
    return flat.split(_PIECE)  # type: ignore[no-any-return, no-untyped-call]
