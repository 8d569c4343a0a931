"""What a model answers in evaluation, beside what it answers by the batches' own moments."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Outputs:
    """The two, over all batches, as sums."""

    def __init__(self) -> None:
        self._differences = self._squares = self._sum = 0.0
        self._values = self._labelled = 0
        self._right = {"evaluation": 0, "batch": 0}

    def add(self, evaluation: Any, batch: Any, labels: Tensor | None) -> None:
        """Add what a model returned for a batch, twice.

        Args:
            evaluation: In evaluation.
            batch: By the batch's own moments.
            labels: The labels, if there are any.
        """
        one, other = _scores(evaluation), _scores(batch)
        if one is None or other is None or one.shape != other.shape:
            return
        if bool(one.isfinite().all()) and bool(other.isfinite().all()):
            wide = other.double()
            self._differences += float((one.double() - wide).square().sum())
            self._squares += float(wide.square().sum())
            self._sum += float(wide.sum())
            self._values += wide.numel()
        if labels is None or one.ndim != 2 or len(one) != len(labels):
            return
        if int(labels.max()) >= one.shape[1] or int(labels.min()) < 0 or one.shape[1] < 2:
            return
        labels = labels.to(one.device)
        self._labelled += len(labels)
        for mode, scores in (("evaluation", one), ("batch", other)):
            self._right[mode] += int((scores.nan_to_num(-math.inf).argmax(1) == labels).sum())

    def distance(self) -> float | None:
        """Return how far they are apart, in standard deviations of the latter; None if unknown."""
        if not self._values:
            return None
        variance = self._squares / self._values - (self._sum / self._values) ** 2
        difference = self._differences / self._values
        return math.sqrt(difference / variance) if variance > 0 else None

    def accuracy(self) -> dict[str, float] | None:
        """Return the share of right answers in both; None without labels."""
        if not self._labelled:
            return None
        return {mode: right / self._labelled for mode, right in self._right.items()}

    def uncertainty(self) -> float:
        """Return the standard error of the difference of the accuracies, at most."""
        accuracy = self.accuracy()
        if accuracy is None:
            return 0.0
        return math.sqrt(sum(p * (1 - p) for p in accuracy.values()) / self._labelled)


def _scores(output: Any) -> Tensor | None:
    """Return the first floating-point tensor of an output that has a dimension."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and leaf.numel():
            return leaf
    return None
