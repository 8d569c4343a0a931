"""The networks of the study, each a function that leaves open what follows its linear maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.study.recipes import ACTIVATIONS, After, Recipe, norm_layer
from batchnorm.study.tasks import declared

Shape: TypeAlias = tuple[int, int, int]

Layers: TypeAlias = Callable[[Shape, int, After], nn.Module]


@dataclass(frozen=True)
class Network:
    """A network, with the training that suits it.

    Attributes:
        name: What the command line and the report call it.
        layers: Makes it: from the shape (C, H, W) of an example, the number of classes, and an
            `After` that makes what follows each linear map. The result takes (N, C, H, W).
        activation: One of `ACTIVATIONS`.
        initialization: One of `INITIALIZATIONS`.
        steps: How many steps a run has.
        rates: The learning rates, from too low to too high.
        usual_rate: One of them, with which it trains with and without normalization.
    """

    name: str
    layers: Layers
    activation: str = "relu"
    initialization: str = "he"
    steps: int = 400
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    usual_rate: float = 0.3

    def declared(self) -> dict[str, Any]:
        """Return what a run of it depends on, as JSON: not what it is mostly trained with."""
        names = ("name", "layers", "activation", "initialization")
        return {name: declared(getattr(self, name)) for name in names}


def dense(shape: Shape, classes: int, after: After, depth: int = 3, width: int = 100) -> nn.Module:
    """Dense layers and a linear output.

    With sigmoids, the network of the first experiment of Ioffe & Szegedy (2015), section 4.1.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(features, width, bias=after.bias), *after(width)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def deep(shape: Shape, classes: int, after: After) -> nn.Module:
    """Ten narrow dense layers and a linear output."""
    return dense(shape, classes, after, depth=10, width=50)


def conv(shape: Shape, classes: int, after: After) -> nn.Module:
    """Three convolutions, the mean over all positions, and a linear output."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for width, stride in ((8, 1), (16, 2), (32, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=after.bias)]
        layers += after(width, 2)
        channels = width
    return nn.Sequential(*layers, *_head(channels, classes))


def residual(shape: Shape, classes: int, after: After) -> nn.Module:
    """A convolution, three residual blocks, the mean over all positions, and a linear output."""
    stem = [nn.Conv2d(shape[0], 8, 3, padding=1, bias=after.bias), *after(8, 2)]
    blocks = [Block(8, 8, 1, after), Block(8, 16, 2, after), Block(16, 32, 2, after)]
    return nn.Sequential(*stem, *blocks, *_head(32, classes))


class Block(nn.Module):
    """Two convolutions, to whose result the input is added: He et al. (2015, arXiv:1512.03385).

    Args:
        inputs: The number of channels that come in.
        outputs: The number that go out.
        stride: Of the first convolution.
        after: Makes what follows each convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, after: After) -> None:
        super().__init__()
        self.straight = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=after.bias),
            *after(outputs, 2),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=after.bias),
            *after(outputs, 2, activate=False),
        )
        self.shortcut = (
            nn.Identity()
            if (inputs, stride) == (outputs, 1)
            else nn.Conv2d(inputs, outputs, 1, stride, bias=True)
        )
        self.activation = ACTIVATIONS[after.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the sum."""
        activated: Tensor = self.activation(self.straight(x) + self.shortcut(x))
        return activated


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


# Each starts as the textbooks advise for its activation: the plain network is no easy opponent.
_DENSE = Network(
    "sigmoid", dense, "sigmoid", "xavier", 900, (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), 1.0
)
_RELU = Network("relu", dense, "relu", "he", 400, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 0.1)

NETWORKS: Mapping[str, Network] = {
    network.name: network
    for network in (
        _DENSE,
        replace(_RELU, name="tanh", activation="tanh", initialization="xavier"),
        _RELU,
        replace(_RELU, name="elu", activation="elu"),
        Network("conv", conv, steps=200),
        Network("residual", residual, steps=200),
        *(
            replace(_RELU, name=f"deep {name}", layers=deep, activation=name, steps=60)
            for name in ACTIVATIONS
        ),
    )
}

INITIALIZATIONS: Mapping[str, Callable[[Tensor], object]] = {
    "xavier": nn.init.xavier_normal_,
    "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "small": partial(nn.init.normal_, std=0.01),
    "gaussian": partial(nn.init.normal_, std=0.1),
    "large": partial(nn.init.xavier_normal_, gain=3.0),
}


def build(network: Network, recipe: Recipe, shape: Shape, classes: int, seed: int) -> nn.Sequential:
    """Make a network with the initial weights of a seed: the same ones for every recipe.

    Args:
        network: Which.
        recipe: How.
        shape: The shape (C, H, W) of one example.
        classes: The number of outputs.
        seed: What the weights are drawn by; biases start at 0.

    Returns:
        The network, in float32. PyTorch's own random numbers go on as if nothing had been drawn.

    Example:
        >>> from batchnorm.study.recipes import NORMALIZED, PLAIN
        >>> conv = NETWORKS["conv"]
        >>> plain, ours = (build(conv, r, (1, 8, 8), 10, 0) for r in (PLAIN, NORMALIZED))
        >>> torch.equal(maps(plain)[0].weight, maps(ours)[0].weight)
        True
    """
    initialize = INITIALIZATIONS[recipe.initialization or network.initialization]
    with torch.random.fork_rng(devices=[]):
        body = network.layers(shape, classes, After(recipe, network.activation))
        torch.manual_seed(seed)  # only now: a layer with a bias has drawn more than one without
        for layer in maps(body):
            initialize(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    first = [norm_layer(recipe, shape[0], 2)] if recipe.first else []
    return nn.Sequential(*first, body)


def maps(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Return the linear maps of a network, from the inputs on."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the normalizations of a network, from the inputs on."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


def activations(model: nn.Module) -> list[nn.Module]:
    """Return the activations of a network, from the inputs on."""
    kinds = tuple(ACTIVATIONS.values())
    return [layer for layer in model.modules() if isinstance(layer, kinds)]
