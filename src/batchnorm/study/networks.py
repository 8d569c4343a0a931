"""The networks of the study, each without normalization, with `torch.nn`'s, and with ours.

Normalization stands before the activation, and the bias that it would cancel is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import batchnorm as bn

NORMS = ("plain", "torch", "batchnorm")

Shape = tuple[int, int, int]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def sigmoid(shape: Shape, classes: int, norm: str) -> nn.Sequential:
    """Three dense sigmoid layers of 100 units and a linear output.

    The network of the first experiment of Ioffe & Szegedy (2015), section 4.1.

    Args:
        shape: The shape (C, H, W) of one example.
        classes: The number of outputs.
        norm: One of `NORMS`.

    Returns:
        A network from (N, C, H, W) to (N, classes).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(shape)
    for _ in range(3):
        layers += [nn.Linear(features, 100, bias=norm == "plain")]
        layers += _normalized(norm, "1d", 100, "sigmoid")
        features = 100
    return nn.Sequential(*layers, nn.Linear(features, classes))


def conv(shape: Shape, classes: int, norm: str) -> nn.Sequential:
    """Three convolutions with ReLU, the mean over all positions, and a linear output.

    Args:
        shape: The shape (C, H, W) of one example; 8x8 to 32x32 fit best.
        classes: The number of outputs.
        norm: One of `NORMS`.

    Returns:
        A network from (N, C, H, W) to (N, classes).
    """
    layers: list[nn.Module] = []
    channels = shape[0]
    for width, stride in ((8, 1), (16, 2), (32, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=norm == "plain")]
        layers += _normalized(norm, "2d", width, "relu")
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, classes))


class Network(NamedTuple):
    """How a network is made, and how its weights start."""

    layers: Callable[[Shape, int, str], nn.Sequential]
    initialize: Callable[[Tensor], Tensor]


# Each starts as the textbooks advise for its activation: the plain network is no easy opponent.
NETWORKS = {
    "sigmoid": Network(sigmoid, nn.init.xavier_normal_),
    "conv": Network(conv, partial(nn.init.kaiming_normal_, nonlinearity="relu")),
}


def build(network: str, norm: str, shape: Shape, classes: int, seed: int) -> nn.Sequential:
    """Make a network with the initial weights of a seed: the same ones for every norm.

    Args:
        network: One of `NETWORKS`.
        norm: One of `NORMS`.
        shape: The shape (C, H, W) of one example.
        classes: The number of outputs.
        seed: What the weights are drawn by; biases start at 0.

    Returns:
        The network, in float32. PyTorch's own random numbers go on as if nothing had been drawn.

    Example:
        >>> plain, normalized = (build("conv", norm, (1, 8, 8), 10, 0) for norm in NORMS[:2])
        >>> torch.equal(plain[0].weight, normalized[0].weight)
        True
    """
    layers, initialize = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        model = layers(shape, classes, norm)
        torch.manual_seed(seed)  # only now: a layer with a bias has drawn more than one without
        for layer in model:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                initialize(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return model


def _normalized(norm: str, rank: str, features: int, activation: str) -> list[nn.Module]:
    """The layers from a linear map's output to the activation's."""
    if norm == "batchnorm":
        ours = {"1d": bn.BatchNorm1d, "2d": bn.BatchNorm2d}[rank]
        return [ours(features, activation=activation)]
    theirs = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d}[rank]
    return [*([theirs(features)] if norm == "torch" else []), _ACTIVATIONS[activation]()]
