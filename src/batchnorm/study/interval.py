"""A number with its interval: what a few seeds say of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A factor, and between which two it lies with a confidence of 95%."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.value)}× ({_short(self.low)}–{_short(self.high)})"


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, robust: bool = False
) -> Interval:
    """Return the geometric mean of paired ratios, with its bootstrap interval.

    The pairs are drawn anew, with replacement, and the interval holds the middle 95% of the means.
    With few pairs it is a little too narrow, as every bootstrap is (Efron & Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        numerators: Positive numbers, one of each pair.
        denominators: The others.
        robust: Take the median in place of the mean, where a few pairs may be far off.

    Returns:
        The mean and the interval; the same numbers give the same interval.

    Example:
        >>> print(ratio([100, 200, 400], [10, 20, 20]))
        12.6× (10–20)
    """
    logarithms = np.log(np.asarray(numerators, float) / np.asarray(denominators, float))
    draws = np.random.default_rng(0).integers(0, len(logarithms), (_RESAMPLES, len(logarithms)))
    centre = np.median if robust else np.mean
    low, high = np.exp(np.percentile(centre(logarithms[draws], axis=1), [2.5, 97.5]))
    return Interval(float(np.exp(centre(logarithms))), float(low), float(high))


def _short(value: float) -> str:
    """Write a number with three significant digits at the most."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
