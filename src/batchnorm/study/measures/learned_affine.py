"""The gradients of gamma and beta beside difference quotients, through a whole network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.study.data import DataSet
from batchnorm.study.descent import Batch, batches, one_thread, step
from batchnorm.study.networks import Network, build, norms
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.tasks import Outcome, Task

AFFINE = {"gamma": "weight", "beta": "bias"}  # what they are called in a layer
STEPS = 20  # before the gradients are compared: by then gamma is not 1, and beta is not 0
ENTRIES = 4  # of the gamma and of the beta of each layer
H = 1e-5  # to either side: errors by curvature and by rounding are both about 1e-10


@dataclass(frozen=True, kw_only=True)
class Errors(Outcome):
    """How far the gradients are from difference quotients.

    Attributes:
        errors: For gamma and for beta, the error of each entry that was tried, as a share of the
            layer's largest gradient.
    """

    errors: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class GradientCheck(Task[Errors]):
    """The gradients of gamma and beta through a whole network, beside central differences.

    Attributes:
        network: The network.
        learning_rate: The length of the steps before.
        seed: What the weights, the batches and the entries are drawn by.
    """

    kind = "gradients of gamma and beta"
    outcome = Errors

    network: Network
    learning_rate: float
    seed: int

    @property
    def digits(self) -> int:
        """How many significant digits of an error are worth keeping."""
        return 3

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes on one core."""
        return paces[self.network.name] * 120

    def perform(self, data_set: DataSet) -> Errors:
        """Compare the gradients."""
        generator = np.random.default_rng(self.seed)
        data = islice(batches(data_set, 60, self.seed, torch.float64), STEPS + 1)
        with one_thread():
            model = build(
                self.network, NORMALIZED, data_set.shape, data_set.classes, self.seed
            ).double()
            *first, last = data
            for x, y in first:
                step(model, x, y, self.learning_rate)
            return Errors(
                errors={
                    name: [
                        error
                        for layer in norms(model)
                        for error in _errors(model, last, getattr(layer, attribute), generator)
                    ]
                    for name, attribute in AFFINE.items()
                }
            )

    def __str__(self) -> str:
        return f"gradients of gamma and beta, {self.network.name}, seed {self.seed}"


def _errors(
    model: nn.Module,
    batch: Batch,
    parameter: Tensor,
    generator: np.random.Generator,
) -> list[float]:
    """The errors of a few entries of the gradient of a parameter."""
    x, y = batch
    (gradient,) = torch.autograd.grad(cross_entropy(model(x), y), [parameter])
    scale = max(gradient.abs().max().item(), 1e-30)
    errors = []
    with torch.no_grad():
        for entry in generator.permutation(len(parameter))[:ENTRIES].tolist():
            value, losses = parameter[entry].item(), []
            for there in (value + H, value - H):
                parameter[entry] = there
                losses.append(cross_entropy(model(x), y).item())
            parameter[entry] = value
            quotient = (losses[0] - losses[1]) / (2 * H)
            errors.append(abs(quotient - gradient[entry].item()) / scale)
    return errors
