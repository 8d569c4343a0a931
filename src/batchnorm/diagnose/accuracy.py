"""How many predictions are right, before and after, and what of the difference may be chance."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_Z = 1.959964  # of a normal distribution, 95% are so many standard deviations around its mean


class Gain(NamedTuple):
    """What something did to the accuracy on the same examples.

    Attributes:
        before: The share of right predictions, of 1.
        after: The same afterwards.
        low: Where the interval of their difference begins, with a confidence of 95%.
        high: Where it ends.
        examples: How many examples there are.
    """

    before: float
    after: float
    low: float
    high: float
    examples: int

    @property
    def is_worse(self) -> bool:
        """Whether it made predictions worse, beyond chance."""
        return self.high < 0

    @property
    def is_better(self) -> bool:
        """Whether it made them better, beyond chance."""
        return self.low > 0

    def __str__(self) -> str:
        what = "WORSE" if self.is_worse else "better" if self.is_better else "no clear difference"
        return (
            f"accuracy {self.before:.1%} -> {self.after:.1%}: {what} "
            f"({100 * self.low:+.1f} to {100 * self.high:+.1f} points, {self.examples:,} examples)"
        )


def gain(before: Tensor, after: Tensor, *, paired: bool = True) -> Gain:
    """Return what changed between two lists of which predictions were right.

    Of the same examples only those tell that are right once and wrong once: the interval is Wald's
    for paired proportions, with half an example added to each of the four counts (Agresti & Min,
    2005). Else it is that of two samples, each with a right and a wrong one added (Agresti & Caffo,
    2000).

    Args:
        before: Whether each prediction was right.
        after: The same.
        paired: Whether the examples are the same, in the same order.
    """
    first, second = float(before.double().mean()), float(after.double().mean())
    if paired:
        n = len(before)
        won, lost = (float((a & ~b).sum()) + 0.5 for a, b in ((after, before), (before, after)))
        wide = n + 2.0
        middle = (won - lost) / wide
        half = _Z * math.sqrt(max(won + lost - (won - lost) ** 2 / wide, 0)) / wide
    else:
        shares = [(float(right.sum()) + 1) / (len(right) + 2) for right in (before, after)]
        middle = shares[1] - shares[0]
        sizes = (len(before) + 2, len(after) + 2)
        spread = sum(p * (1 - p) / size for p, size in zip(shares, sizes, strict=True))
        half = _Z * math.sqrt(spread)
    return Gain(first, second, middle - half, middle + half, len(before))


def logits_of(output: Any) -> Tensor | None:
    """Return the logits among what a model returned, (N, classes); None if there are none."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def labels_in(batch: Any, examples: int | None = None) -> Tensor | None:
    """Return what are labels in a batch: its second element, or `labels` of a dict.

    Integers, one for each example.

    Args:
        batch: The batch.
        examples: The number of its examples, by default that of its first tensor.
    """
    examples = examples_in(batch) if examples is None else examples
    found = None
    if isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    elif hasattr(batch, "get"):
        found = batch.get("labels")
    if not isinstance(found, Tensor) or found.ndim != 1 or len(found) != examples or not examples:
        return None
    whole = not found.is_floating_point() and not found.is_complex() and found.dtype != torch.bool
    return found if whole else None


def examples_in(batch: Any) -> int | None:
    """Return the number of examples in a batch, the size of its first tensor; None if unknown."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    return None
