"""A number with its interval: what a few seeds say of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An effect, and between which two values it lies with a confidence of 95%.

    Attributes:
        value: The effect.
        low: Where the interval begins.
        high: Where it ends.
        unit: What is counted; `×` says that it is a factor.
    """

    value: float
    low: float
    high: float
    unit: str = "×"

    def __str__(self) -> str:
        if self.unit == "×":
            return f"{short(self.value)}× ({short(self.low)}–{short(self.high)})"
        ends = f"{_signed(self.low)} to {_signed(self.high)}"
        return f"{_signed(self.value)}{self.unit} ({ends})"


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, robust: bool = False
) -> Interval:
    """Return the geometric mean of paired ratios, with its bootstrap interval.

    The pairs are drawn anew, with replacement, and the interval holds the middle of the means: of
    many pairs 95%, of few as much more as makes up for their small spread (the expanded percentile
    interval of Hesterberg 2015, What Teachers Should Know about the Bootstrap). From five pairs it
    then holds the truth about 91 times in 100.

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
    value, low, high = map(math.exp, _ends(logarithms, robust))
    return Interval(value, low, high)


def difference(minuends: Sequence[float], subtrahends: Sequence[float], unit: str = "") -> Interval:
    """Return the mean of paired differences, with its bootstrap interval, as `ratio` does.

    Args:
        minuends: Numbers, one of each pair.
        subtrahends: The others, or a single one for all.
        unit: What they count.

    Returns:
        The mean and the interval.

    Example:
        >>> print(difference([3, 4, 6], [1, 1, 1], " points"))
        +3.33 points (+2 to +5)
    """
    differences = np.asarray(minuends, float) - np.asarray(subtrahends, float)
    return Interval(*_ends(differences, robust=False), unit)


def short(value: float) -> str:
    """Write a number with three significant digits, or all before the point.

    Example:
        >>> short(0.00123456), short(1234.5), short(5e-13)
        ('0.00123', '1234', '5e-13')
    """
    return f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:.0f}"


def _ends(values: NDArray[np.float64], robust: bool) -> tuple[float, float, float]:
    """The centre of values, and the ends of its interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    centre = np.median if robust else np.mean
    low, high = np.quantile(centre(values[draws], axis=1), _tails(len(values)))
    return float(centre(values)), float(low), float(high)


def _tails(count: int) -> tuple[float, float]:
    """The quantiles of the resamples between which 95% lie, corrected for few values.

    The plain 2.5% and 97.5% are those of a normal distribution with the variance of the sample:
    from five values they would hold the truth 85 times in 100.
    """
    if count < 2:
        return 0.0, 1.0
    share = float(norm.cdf(-math.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1)))
    return share, 1.0 - share


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{short(value)}"
