"""What all claims ask their runs from, so that they share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchnorm.study.data import DataSet
from batchnorm.study.networks import NETWORKS, Network
from batchnorm.study.recipes import Recipe
from batchnorm.study.tasks import fingerprint
from batchnorm.study.training import Run


@dataclass(frozen=True)
class Plan:
    """A study of one data set.

    Attributes:
        data: The data set's fingerprint.
        chance: The accuracy of always naming the most frequent class.
        shape: The shape (C, H, W) of one example.
        networks: What can be trained, by name.
        brought: The names of those that a user brings.
        seeds: The seeds of each run; a verdict needs five.
        repeats: How often the time of an epoch is taken.
    """

    data: str
    chance: float
    shape: tuple[int, int, int]
    networks: Mapping[str, Network] = field(default_factory=lambda: NETWORKS)
    brought: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    repeats: int = 15

    def run(
        self,
        network: str,
        recipe: Recipe,
        rate: float | None = None,
        seed: int = 0,
        *,
        steps: int | None = None,
        **settings: Any,
    ) -> Run:
        """Return one run.

        Args:
            network: The name of a network.
            recipe: How it is made.
            rate: The learning rate; by default the network's usual one.
            seed: The seed.
            steps: By default the network's.
            settings: Of `Run`.
        """
        of = self.networks[network]
        rate = float(of.usual_rate if rate is None else rate)  # 1 and 1.0 have different hashes
        return Run(self.data, of, recipe, rate, seed, steps or of.steps, **settings)

    def runs(
        self, network: str, recipe: Recipe, rate: float | None = None, **settings: Any
    ) -> list[Run]:
        """Return the runs that differ by the seed alone; the arguments are those of `run`."""
        return [self.run(network, recipe, rate, seed, **settings) for seed in self.seeds]

    def grid(self, network: str, recipes: Sequence[Recipe]) -> list[Run]:
        """Return the runs of each recipe with each learning rate of the network."""
        return [
            run
            for recipe in recipes
            for rate in self.networks[network].rates
            for run in self.runs(network, recipe, rate)
        ]


def plan(data_set: DataSet, networks: Sequence[Network] = ()) -> Plan:
    """Plan a study.

    Args:
        data_set: What is studied.
        networks: Networks beside the study's own.

    Returns:
        The plan.
    """
    counts = np.bincount(data_set.test_labels)
    return Plan(
        data=fingerprint(data_set),
        chance=float(counts.max() / counts.sum()),
        shape=data_set.shape,
        networks={**NETWORKS, **{network.name: network for network in networks}},
        brought=tuple(network.name for network in networks),
    )
