"""The loss surface of a linear model, by its inputs: exact, as nothing has to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from batchnorm.study.data import DataSet
from batchnorm.study.descent import one_thread
from batchnorm.study.measures.treatments import mean_and_std
from batchnorm.study.observation import Treatment
from batchnorm.study.tasks import Outcome, Task

EXAMPLES = 5000  # at the most, so that the largest data sets take seconds
FLAT = 1e-10  # of the largest eigenvalue: the rounding of float32 inputs is not far below
LEFT = 0.01  # of the excess loss at the start
PLACES = 21  # of a spectrum that are kept


@dataclass(frozen=True)
class Surface:
    """A quadratic loss surface.

    Attributes:
        condition: The largest eigenvalue of its Hessian over the smallest one that is not flat.
        steps: How many steps gradient descent takes.
        curved: How many eigenvalues are not flat.
        spectrum: The eigenvalues that are not flat, in units of the largest, at a few places from
            the largest to the smallest.
    """

    condition: float
    steps: int
    curved: int
    spectrum: list[float]


@dataclass(frozen=True, kw_only=True)
class Surfaces(Outcome):
    """The loss surface of a linear model, by its inputs; the fields of a `Surface` each."""

    raw: Any = None
    centred: Any = None
    standardized: Any = None


@dataclass(frozen=True)
class LeastSquares(Task[Surfaces]):
    """A linear model with a bias, whose loss is half the mean squared error of one-hot labels.

    Attributes:
        features: How many inputs it has.
        treatment: What is done to the data set first.
        seed: By what half of the training examples is drawn.
    """

    kind = "least squares"
    outcome = Surfaces

    features: int
    treatment: Treatment | None
    seed: int

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes: some multiplications and eigenvectors of matrices."""
        thousands = self.features / 1000
        return 0.05 + 2 * thousands**2 * (1 + thousands / 2)

    def perform(self, data_set: DataSet) -> Surfaces:
        """Find the eigenvalues, and count the steps, in float64."""
        data_set = data_set if self.treatment is None else self.treatment(data_set)
        order = np.random.default_rng(self.seed).permutation(len(data_set.train_labels))
        half = order[: min(max(len(order) // 2, 1), EXAMPLES)]
        y = one_hot(torch.from_numpy(data_set.train_labels[half]), data_set.classes).double()
        x = data_set.train_inputs[half]
        mean, std = mean_and_std(x)
        with one_thread():
            raw, centred, standardized = (
                _surface(torch.from_numpy(of).flatten(1), y)
                for of in (x.astype(np.float64), x - mean, (x - mean) / std)
            )
        return Surfaces(raw=raw, centred=centred, standardized=standardized)

    def __str__(self) -> str:
        treated = self.treatment.__name__.replace("_", " ") if self.treatment else "as they are"
        return f"least squares, inputs {treated}, seed {self.seed}"


def _surface(x: Tensor, y: Tensor) -> Surface:
    """Measure the loss of a linear map with a bias, from x (N, F) to y (N, K)."""
    x = pad(x, (0, 1), value=1.0)
    eigenvalues, directions = torch.linalg.eigh(x.T @ x / len(x))
    eigenvalues, directions = eigenvalues.flip(0), directions.flip(1)
    curved = eigenvalues > FLAT * eigenvalues[0]
    slopes = directions[:, curved].T @ (x.T @ y / len(x))  # of the loss at weights 0
    shares = eigenvalues[curved] / eigenvalues[0]
    places = torch.linspace(0, len(shares) - 1, PLACES).round().long()
    return Surface(
        condition=float(1 / shares[-1]),
        steps=steps(shares, slopes.square().sum(1) / eigenvalues[curved]),
        curved=len(shares),
        spectrum=shares[places].tolist(),
    )


def steps(shares: Tensor, excess: Tensor) -> int:
    """Return after how many steps of gradient descent 1% of the excess loss is left.

    With the rate 1 / (largest eigenvalue) a step leaves (1 - share)^2 of the excess of each
    direction, so that nothing needs to be trained.

    Args:
        shares: The eigenvalues of the Hessian, in units of the largest one.
        excess: The loss along each eigenvector at the start, less the least possible one.

    Example:
        >>> steps(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0]))  # 1/4, 1/16, 1/64 of one half
        3
    """
    kept = 2 * torch.log1p(-shares)

    def enough(count: int) -> bool:
        return bool((excess * (kept * count).exp()).sum() <= LEFT * excess.sum())

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
