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
from batchnorm.study.interval import difference
from batchnorm.study.networks import norms
from batchnorm.study.observation import Result, State
from batchnorm.study.shifts import SEVERITIES, SHIFTS, applies, shift

MOST = 500  # examples to adapt on, and as many to try
SHARE = 3  # one in so many of them is scored
SAMPLES = 100  # of clean examples, by which the threshold is set
RATE = 0.05  # of false alarms: the share of these samples that are above the threshold


def under_shift(state: State) -> dict[str, Any] | None:
    """Return what shifts of the held-out inputs do to a network at the end of its run.

    One half of the examples is there to adapt on, without labels, the other to try. What is scored
    is from the half to try, and the threshold is set by clean samples of the other.

    Returns:
        By the name of the shift, for each severity: the accuracy as it was trained and when
        adapted, in percent, and the score. `clean` has the same of the inputs as they are,
        `threshold` the score above which a sample is flagged, and `alarms` the share of the clean
        samples of the half to try that are.
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
        return [*accuracies, score(trained, moments(trained, to_try[: _size(half)]))]

    found: dict[str, Any] = {
        name: [
            look(shifted(chosen, name, severity, 0), shifted(tried, name, severity, 1))
            for severity in SEVERITIES
        ]
        for name in SHIFTS
        if applies(name, state.data_set.shape)
    }
    threshold = float(np.quantile(_clean_scores(trained, chosen), 1 - RATE))
    return {
        **found,
        "clean": look(chosen, tried),
        "threshold": threshold,
        "alarms": float(np.mean(np.array(_clean_scores(trained, tried)) > threshold)),
    }


def _size(half: int) -> int:
    return max(half // SHARE, 1)


def _clean_scores(model: nn.Module, x: Tensor) -> list[float]:
    """Return the scores of samples of these inputs, each drawn without replacement."""
    of, generator = moments(model, x), np.random.default_rng(0)
    drawn = (generator.permutation(len(x))[: _size(len(x))] for _ in range(SAMPLES))
    return [score(model, [layer[:, sample] for layer in of]) for sample in drawn]


def _adapted(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy whose running moments are those of these inputs."""
    model = copy.deepcopy(model)
    if norms(model):
        bn.calibrate(model, [x], progress=False)
    return model


def moments(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what each normalization gets, in evaluation: the moments of each example.

    Those of a sample are the means of its examples' ones, so many samples need one look.

    Returns:
        For each layer the means of the values and of their squares, in float64, shape (2, N, C).
    """
    found: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        values = inputs[0].flatten(2) if inputs[0].dim() > 2 else inputs[0][:, :, None]
        values = values.double()
        found.append(torch.stack([values.mean(2), values.square().mean(2)]))

    hooks = [layer.register_forward_pre_hook(look) for layer in norms(model)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def score(model: nn.Module, of: Sequence[Tensor]) -> float:
    """Return how far the moments that a network has kept are from those it has on other inputs.

    Args:
        model: The network as it was trained.
        of: The `moments` of the inputs.

    Returns:
        The symmetric Kullback-Leibler divergence between two normal distributions, the mean over
        the channels of each layer, then over the layers; 0 without normalization.
    """
    layers = []
    for layer, seen in zip(norms(model), of, strict=True):
        mean, square = seen.mean(1)
        # What the layer divides by holds eps, so that a constant channel is not infinitely far.
        before = layer.get_buffer("running_var").double() + layer.eps
        after = (square - mean.square()).clamp(min=0) + layer.eps
        distance = (layer.get_buffer("running_mean").double() - mean).square()
        each = ((before + distance) / after + (after + distance) / before - 2) / 2
        layers.append(float(torch.nan_to_num(each.mean(), nan=1e30).clamp_max(1e30)))
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
        threshold: The score above which a sample is flagged.
        alarms: The share of clean samples that are flagged.
    """

    names: Sequence[str]
    looks: NDArray[np.float64]
    clean: NDArray[np.float64]
    threshold: NDArray[np.float64]
    alarms: NDArray[np.float64]


def seen(results: Sequence[Result]) -> Seen:
    """Return what was seen at the end of the runs of all seeds."""
    found = [result.seen(under_shift)[-1] for result in results]
    names = [name for name in SHIFTS if name in found[0]]
    looks = np.array([[of[name] for of in found] for name in names])
    clean = np.array([of["clean"] for of in found]).T
    threshold, alarms = (np.array([of[name] for of in found]) for name in ("threshold", "alarms"))
    return Seen(names, np.moveaxis(looks, 1, -1), clean, threshold, alarms)


def flagged_share(of: Seen, severity: int) -> list[float]:
    """Return, by seed, the share of the shifts from a severity on that the score flags."""
    above = of.looks[:, SEVERITIES.index(severity) :, 2] > of.threshold
    shares: list[float] = above.mean((0, 1)).tolist()
    return shares


def won_back(of: Seen, points: float) -> tuple[list[str], list[str]]:
    """Return after which shifts adaptation wins back less than half, and after which it does not.

    A shift whose highest severity does not take more than these points is in neither.
    """
    little: list[str] = []
    much: list[str] = []
    clean = of.clean[0]
    for name, (worst, adapted, _) in zip(of.names, of.looks[:, -1], strict=True):
        if difference(worst, clean).high < -points:
            half_way = (worst + clean) / 2
            (little if difference(adapted, half_way).high < 0 else much).append(name)
    return little, much
