"""The table of all that was measured: a row for each case and implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from batchnorm.bench.cases import Case, label
from batchnorm.bench.contenders import BASE
from batchnorm.bench.measure import Taken


@dataclass(frozen=True)
class Row:
    """One implementation in one case; its attributes are the columns of the CSV file.

    Attributes:
        shape: The batch's, (N, C, ...), as text.
        layout: The order of its dimensions in memory.
        dtype: Its type.
        mode: What is timed.
        fusion: What follows the normalization.
        threads: How many there are.
        implementation: Whose time it is.
        mb: The size of the batch in MB.
        q25_us: The lower quartile of the times, in microseconds.
        median_us: Their median.
        q75_us: Their upper quartile.
        ratio: How many times the speed of `torch.nn`: the median over the rounds.
        ratio_q25: Its lower quartile.
        ratio_q75: Its upper quartile.
        passes: How often a batch is read or written at least, if what is read twice stays in cache.
        of_copy_speed: The time that these passes take at copy speed, as a part of the median.
        floor: The same number of passes, where a channel that does not stay in cache is read twice.
        of_floor: The time that those passes take at copy speed, as a part of the median.
        max_error: The largest error of all results, relative to the largest value of each.
        rounds: How often each was timed.
    """

    shape: str
    layout: str
    dtype: str
    mode: str
    fusion: str
    threads: int
    implementation: str
    mb: float
    q25_us: float
    median_us: float
    q75_us: float
    ratio: float
    ratio_q25: float
    ratio_q75: float
    passes: int
    of_copy_speed: float
    floor: int
    of_floor: float
    max_error: float
    rounds: int

    @property
    def label(self) -> str:
        """Which case it is of."""
        return label(self.shape, self.layout, self.dtype, self.fusion, self.mode, self.threads)


def rows(taken: Iterable[Taken], speeds: Mapping[int, float]) -> list[Row]:
    """Return the rows of all cases.

    Args:
        taken: What was measured.
        speeds: For each number of threads, how many bytes a second a copy reads and writes.
    """
    return [
        row
        for case, times, errors in taken
        for row in _rows(case, times, errors, speeds[case.threads])
    ]


def _rows(
    case: Case, times: dict[str, list[float]], errors: dict[str, float], speed: float
) -> Iterator[Row]:
    problem = case.problem
    for name, own in times.items():
        low, median, high = np.quantile(own, (0.25, 0.5, 0.75)).tolist()
        ratio_low, ratio, ratio_high = ratios(times[BASE.name], own)
        crossing = problem.mb * 1e6 / speed / median
        yield Row(
            shape=problem.size,
            layout=problem.layout,
            dtype=problem.dtype,
            mode=case.mode,
            fusion=problem.fusion,
            threads=case.threads,
            implementation=name,
            mb=rounded(problem.mb),
            q25_us=rounded(low * 1e6),
            median_us=rounded(median * 1e6),
            q75_us=rounded(high * 1e6),
            ratio=rounded(ratio),
            ratio_q25=rounded(ratio_low),
            ratio_q75=rounded(ratio_high),
            passes=case.passes,
            of_copy_speed=rounded(case.passes * crossing),
            floor=case.floor,
            of_floor=rounded(case.floor * crossing),
            max_error=rounded(errors[name], 2),
            rounds=len(own),
        )


def ratios(theirs: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of their time / own time over the rounds: over 1 is faster.

    What was timed in one round is divided, and not one median by another: the speed of a machine
    drifts, and both drift with it.

    Example:
        >>> ratios([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        (2.0, 2.0, 2.5)
    """
    low, median, high = np.quantile(np.divide(theirs, own), (0.25, 0.5, 0.75)).tolist()
    return low, median, high


def rounded(value: float, digits: int = 4) -> float:
    """Return a number with so many digits.

    Example:
        >>> rounded(123.456)
        123.5
    """
    return float(f"{value:.{digits}g}")
