"""What a prediction depends on, at the end of a run: in evaluation and in training."""

from __future__ import annotations

from itertools import islice
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.study.descent import accuracy, batches
from batchnorm.study.measures.runs import held
from batchnorm.study.networks import norms
from batchnorm.study.observation import State

ALONE = 100  # examples that are predicted one by one
BATCHES = 200  # of training examples, at the most, whose moments are the population's


class Predicted(TypedDict):
    """How predictions depend on the batch, and on the moments.

    Attributes:
        alone: The largest difference between outputs for one example and for many in evaluation, as
            a share of the largest output.
        refused: Whether one example alone is refused in training.
        changed: The share of the examples whose class in training is another one in another batch.
        means: How far the running means are from the population's, in its standard deviations.
        variances: How far the running variances are, as the logarithm of their ratio.
        running: The accuracy in evaluation with the running averages.
        population: The accuracy with the population's moments.
    """

    alone: float
    refused: bool
    changed: float
    means: float
    variances: float
    running: float
    population: float


def at_inference(state: State) -> Predicted | None:
    """Return how predictions depend on the batch and the moments, at the end."""
    if not state.last:
        return None
    x = state.held_out[0]
    model, population = state.copy(), _calibrated(state)
    means, variances = _distances(model, population)
    return {
        "alone": _alone(model, x[:ALONE]),
        "refused": _refused(state.copy(), x),
        "changed": _changed(state.copy(), x, len(state.batch[1])),
        "means": means,
        "variances": variances,
        "running": accuracy(model, *state.held_out),
        "population": accuracy(population, *state.held_out),
    }


def _alone(model: nn.Module, x: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(one) for one in torch.split(x, 1)])
    model.train()
    return held(float((alone - together).abs().max() / together.abs().max()))


def _refused(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x[:1])
    except ValueError:
        return True
    return False


def _changed(model: nn.Module, x: Tensor, size: int) -> float:
    """Predict the examples in two orders, by batches of the size in training."""
    generator = torch.Generator().manual_seed(0)
    size = min(size, len(x))
    x = x[: len(x) // size * size]
    other = torch.randperm(len(x), generator=generator)
    with torch.no_grad():
        first = torch.cat([model(some).argmax(1) for some in torch.split(x, size)])
        second = torch.cat([model(some).argmax(1) for some in torch.split(x[other], size)])
    return float((first[other] != second).double().mean())


def _calibrated(state: State) -> nn.Module:
    """A copy with the moments of the training examples, by batches of the size in training."""
    model, (x, y) = state.copy(), state.batch
    count = min(len(state.data_set.train_labels) // len(y), BATCHES)
    data = list(islice(batches(state.data_set, len(y), seed=0, dtype=x.dtype), count))
    bn.calibrate(model, data, progress=False)
    return model


def _distances(model: nn.Module, population: nn.Module) -> tuple[float, float]:
    means, variances = [], []
    for ours, theirs in zip(norms(model), norms(population), strict=True):
        (mean, var), (true_mean, true_var) = _running(ours), _running(theirs)
        means.append(float(((mean - true_mean).abs() / true_var.sqrt()).mean()))
        variances.append(float((var / true_var).log().abs().mean()))
    return held(float(np.mean(means))), held(float(np.mean(variances)))


def _running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var.clamp(min=1e-12)
