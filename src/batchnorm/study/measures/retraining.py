"""Retraining under a shift: what it has that adaptation has not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchnorm.study.data import DataSet
from batchnorm.study.shifts import shift


@dataclass(frozen=True)
class Shifted:
    """A treatment of a data set: all its inputs shifted, those to train on and those to try.

    Attributes:
        name: Of the shift.
        severity: One of its severities.
    """

    name: str
    severity: int

    @property
    def __name__(self) -> str:  # by which a run says what is done to its data
        return f"{self.name} {self.severity}"

    def __call__(self, data_set: DataSet) -> DataSet:
        """Return the shifted data set."""
        low, high = float(data_set.train_inputs.min()), float(data_set.train_inputs.max())

        def shifted(inputs: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
            return shift(inputs, self.name, self.severity, low=low, high=high, seed=seed)

        return replace(
            data_set,
            train_inputs=shifted(data_set.train_inputs, 0),
            test_inputs=shifted(data_set.test_inputs, 1),
        )
