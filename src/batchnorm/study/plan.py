"""How large a study is: what all claims ask their runs from, so that they share them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchnorm.study.data import DataSet
from batchnorm.study.networks import NORMS
from batchnorm.study.tasks import fingerprint
from batchnorm.study.training import Run


@dataclass(frozen=True)
class Size:
    """What a network gets of a study.

    Attributes:
        steps: How many steps a run has.
        rates: The learning rates, from too low to too high.
        usual_rate: One of them, with which every norm trains.
    """

    steps: int
    rates: tuple[float, ...]
    usual_rate: float


@dataclass(frozen=True)
class Plan:
    """A study of one data set.

    Attributes:
        data: The data set's fingerprint.
        chance: The accuracy of always naming the most frequent class.
        sizes: What each network gets.
        seeds: The seeds of each run.
        repeats: How often the time of an epoch is taken.
    """

    data: str
    chance: float
    sizes: dict[str, Size]
    seeds: tuple[int, ...]
    repeats: int

    def run(self, network: str, norm: str, rate: float, seed: int) -> Run:
        """Return one run of the grid."""
        return Run(self.data, network, norm, rate, seed, self.sizes[network].steps)

    def runs(self, network: str, norm: str, rate: float) -> list[Run]:
        """Return the runs of the grid that differ by the seed alone."""
        return [self.run(network, norm, rate, seed) for seed in self.seeds]

    def grid(self) -> list[Run]:
        """Return all runs of the grid, the first seed's before the others'."""
        return [
            self.run(network, norm, rate, seed)
            for seed in self.seeds
            for network, size in self.sizes.items()
            for rate in size.rates
            for norm in NORMS
        ]


_FULL = {
    "sigmoid": Size(900, (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), usual_rate=1.0),
    "conv": Size(200, (0.1, 0.3, 1.0, 3.0, 10.0), usual_rate=0.3),
}
_QUICK = {
    "sigmoid": Size(400, (2.0,), usual_rate=2.0),
    "conv": Size(70, (0.3, 3.0), usual_rate=0.3),
}


def plan(data_set: DataSet, *, quick: bool = False) -> Plan:
    """Plan a study.

    Args:
        data_set: What is studied.
        quick: Whether a first impression, in seconds, is enough.

    Returns:
        The plan.
    """
    counts = np.bincount(data_set.test_labels)
    return Plan(
        data=fingerprint(data_set),
        chance=float(counts.max() / counts.sum()),
        sizes=_QUICK if quick else _FULL,
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4),
        repeats=5 if quick else 15,
    )
