"""The ways to run a network: as it is, and with each of our tools, each in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import batchnorm as bn
from benchmarks.models.networks import Posed

TRAINING, INFERENCE = "training", "inference"
MODES = (TRAINING, INFERENCE)

#: The rate of SGD: the loss of every network falls by about a tenth over 20 steps. With random
#: weights, and statistics of few images, rounding grows from step to step: see `REORDERED`.
RATE = 0.001

Make = Callable[[nn.Module, Tensor], nn.Module]


class Way(NamedTuple):
    """A way to run a network.

    Attributes:
        name: What it is called.
        make: Returns the module to call, of a copy of the model, which it may change, and images.
        modes: Those of `MODES` that it is there for.
        reordered: Whether it gets the images in another order.
        is_ours: Whether it is held to the model as it is in float64, too; another compiler would
            take minutes more for that.
    """

    name: str
    make: Make
    modes: tuple[str, ...] = MODES
    reordered: bool = False
    is_ours: bool = True


def _as_it_is(model: nn.Module, _: Tensor) -> nn.Module:
    return model


def _converted(model: nn.Module, _: Tensor) -> nn.Module:
    bn.convert(model)
    return model


def _accelerated(model: nn.Module, _: Tensor) -> nn.Module:
    return bn.accelerate(model)


def _saving(model: nn.Module, _: Tensor) -> nn.Module:
    return bn.accelerate(model, save_memory=True)


def _folded(model: nn.Module, images: Tensor) -> nn.Module:
    return bn.fold(model, images, inplace=True)[0]


def _compiled(model: nn.Module, _: Tensor) -> nn.Module:
    compiled: Any = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


STOCK = Way("stock", _as_it_is)
#: Differs from the first by rounding alone, and so shows what that does, and what noise does.
REORDERED = Way("stock, reordered", _as_it_is, (TRAINING,), reordered=True)
CONVERTED = Way("convert", _converted)
ACCELERATED = Way("accelerate", _accelerated)
SAVING = Way("accelerate, save_memory", _saving, (TRAINING,))
FOLDED = Way("fold", _folded, (INFERENCE,))
COMPILED = Way("torch.compile", _compiled, is_ours=False)
WAYS = (STOCK, REORDERED, CONVERTED, ACCELERATED, SAVING, FOLDED, COMPILED)
BY_NAME = {way.name: way for way in WAYS}


class Training:
    """A training step: gradients are set to None, forward with the loss, backward, SGD.

    Args:
        way: The way the network is run.
        posed: The network, which is copied.

    Attributes:
        model: The model that has the parameters.
        losses: Those of the steps so far.
    """

    def __init__(self, way: Way, posed: Posed) -> None:
        posed = posed.reordered() if way.reordered else posed
        self.model = copy.deepcopy(posed.training)
        self.images, self.labels = posed.images, posed.labels
        self.losses: list[float] = []
        self._called = way.make(self.model, self.images)
        self._optimizer = torch.optim.SGD(self.model.parameters(), RATE)

    def loss(self) -> Tensor:
        """Return the loss, before its backward pass."""
        self._optimizer.zero_grad()
        loss: Tensor = self._called(pixel_values=self.images, labels=self.labels).loss
        return loss

    def __call__(self) -> None:
        """Do a step."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.losses.append(loss.item())


class Inference:
    """A forward pass in evaluation, without gradients.

    Args:
        way: The way the network is run.
        posed: The network, which is copied.
    """

    def __init__(self, way: Way, posed: Posed) -> None:
        self.images = posed.images
        self._called = way.make(copy.deepcopy(posed.inference), self.images)

    def __call__(self) -> Tensor:
        """Return the logits."""
        with torch.no_grad():
            logits: Tensor = self._called(self.images).logits
        return logits
