"""What shifts of the inputs do to a network: its accuracy, the same adapted, and a score."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study.networks import norms
from batchnorm.study.shifts import SEVERITIES, SHIFTS, applies, shift
from batchnorm.study.training import Result, State

MOST = 500  # examples to adapt on, and as many to try


def under_shift(state: State) -> dict[str, Any] | None:
    """Return what shifts of the held-out inputs do to a network at the end of its run.

    One half of the examples is there to adapt on, without labels, the other to try.

    Returns:
        By the name of the shift, for each severity: the accuracy as it was trained and when
        adapted, in percent, and the score. `clean` has the same of the inputs as they are, and
        `other` the score of the half that is tried.
    """
    if not state.last:
        return None
    x, y = state.held_out
    half = min(len(y) // 2, MOST)
    chosen, tried, labels = x[:half], x[half : 2 * half], y[half : 2 * half]
    values = state.data_set.train_inputs
    low, high = float(values.min()), float(values.max())
    trained = state.copy().eval()

    def shifted(x: Tensor, name: str, severity: int, seed: int) -> Tensor:
        inputs = x.float().numpy()
        return torch.from_numpy(shift(inputs, name, severity, low=low, high=high, seed=seed)).to(x)

    def look(to_adapt: Tensor, to_try: Tensor) -> list[float]:
        adapted = _adapted(trained, to_adapt)
        accuracies = [_accuracy(model, to_try, labels) for model in (trained, adapted)]
        return [*accuracies, score(trained, adapted)]

    found: dict[str, Any] = {
        name: [
            look(shifted(chosen, name, severity, 0), shifted(tried, name, severity, 1))
            for severity in SEVERITIES
        ]
        for name in SHIFTS
        if applies(name, state.data_set.shape)
    }
    return {
        **found,
        "clean": look(chosen, tried),
        "other": score(trained, _adapted(trained, tried)),
    }


def _adapted(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy whose running moments are those of these inputs."""
    model = copy.deepcopy(model)
    if norms(model):
        bn.calibrate(model, [x], progress=False)
    return model


def score(model: nn.Module, adapted: nn.Module) -> float:
    """Return how far the moments that a network has kept are from those it has on other inputs.

    Args:
        model: The network as it was trained.
        adapted: The same, with its running moments set to those of other inputs.

    Returns:
        The symmetric Kullback-Leibler divergence between two normal distributions, the mean over
        the channels of each layer, then over the layers; 0 without normalization.
    """
    layers = []
    for a, b in zip(norms(model), norms(adapted), strict=True):
        # What the layer divides by holds eps, so that a constant channel is not infinitely far.
        before, after = (layer.get_buffer("running_var").double() + layer.eps for layer in (a, b))
        means = (layer.get_buffer("running_mean").double() for layer in (a, b))
        distance = (next(means) - next(means)).square()
        each = ((before + distance) / after + (after + distance) / before - 2) / 2
        layers.append(float(each.mean().clamp_max(1e30)))
    return float(np.mean(layers)) if layers else 0.0


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


@dataclass(frozen=True)
class Seen:
    """What shifts did to the networks of all seeds, which are the last dimension.

    Attributes:
        names: The shifts.
        looks: By shift, severity, and what was looked at: accuracy, the same adapted, and score.
        clean: By what was looked at, on inputs as they are.
        highest: The highest score of either half of the clean inputs.
    """

    names: Sequence[str]
    looks: NDArray[np.float64]
    clean: NDArray[np.float64]
    highest: NDArray[np.float64]


def seen(results: Sequence[Result]) -> Seen:
    """Return what was seen at the end of the runs of all seeds."""
    found = [result.seen(under_shift)[-1] for result in results]
    names = [name for name in SHIFTS if name in found[0]]
    looks = np.array([[of[name] for of in found] for name in names])
    clean = np.array([of["clean"] for of in found]).T
    other = np.array([of["other"] for of in found])
    return Seen(names, np.moveaxis(looks, 1, -1), clean, np.maximum(clean[2], other))
