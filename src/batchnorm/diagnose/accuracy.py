"""How many predictions are right, before and after, and what of the difference may be chance."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def gain(before: Tensor, after: Tensor) -> Gain:
    """Return what changed between two lists of which predictions were right.

    Only the examples that are right once and wrong once tell: the interval is Wald's for paired
    proportions, with half an example added to each of the four counts (Agresti & Min, 2005).

    Args:
        before: Whether each prediction was right.
        after: The same, in the same order.
    """
    n = len(before)
    won, lost = (float((a & ~b).sum()) + 0.5 for a, b in ((after, before), (before, after)))
    wide = n + 2.0
    middle = (won - lost) / wide
    half = _Z * math.sqrt(max(won + lost - (won - lost) ** 2 / wide, 0)) / wide
    return Gain(
        float(before.double().mean()),
        float(after.double().mean()),
        middle - half,
        middle + half,
        n,
    )


def logits_of(output: Any) -> Tensor | None:
    """Return the logits among what a model returned, (N, classes); None if there are none."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch: the second of two, of whole numbers, one for each example.

    A mapping has them as "labels".
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        labels = batch[1]
    elif hasattr(batch, "get"):
        labels = batch.get("labels")
    else:
        return None
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 1
    return labels if whole and labels.dtype != torch.bool else None
