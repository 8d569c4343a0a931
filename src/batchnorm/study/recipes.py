"""What may follow a linear map: normalization before or after the activation, and dropout.

A network says where its linear maps are; a `Recipe` says how it is normalized, where dropout
stands, and how its weights start. So every network comes in every variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn

Norm: TypeAlias = Literal["plain", "torch", "batchnorm", "ghost", "renormalized"]

ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
}

_DROPPED = 0.3  # the share of activations that dropout sets to 0


@dataclass(frozen=True)
class Recipe:
    """How a network is made.

    Attributes:
        norm: Without normalization, with `torch.nn`'s or with batchnorm's, or with batchnorm's
            ghost batches or renormalization.
        place: Whether normalization stands before or after the activation.
        dropout: Whether dropout stands before or after normalization; empty for none.
        affine: Whether gamma and beta are trained, fixed at 1 and 0, or absent.
        initialization: One of `INITIALIZATIONS`; empty for the network's own.
        momentum: How much a batch counts in the running statistics.
        group: How many examples a ghost batch has.
        first: Whether the inputs are normalized, too.
        fused: Whether batchnorm's layer computes the activation as well.
    """

    norm: Norm = "plain"
    place: Literal["before", "after"] = "before"
    dropout: Literal["", "before", "after"] = ""
    affine: Literal["trained", "fixed", "absent"] = "trained"
    initialization: str = ""
    momentum: float = 0.1
    group: int = 16
    first: bool = False
    fused: bool = False

    @property
    def normalized(self) -> bool:
        """Whether there is normalization."""
        return self.norm != "plain"


PLAIN, TORCH, NORMALIZED = Recipe("plain"), Recipe("torch"), Recipe("batchnorm")


@dataclass(frozen=True)
class After:
    """Makes what follows a linear map: normalization, activation, dropout.

    Args:
        recipe: How the network is made.
        activation: One of `ACTIVATIONS`.
    """

    recipe: Recipe
    activation: str

    @property
    def bias(self) -> bool:
        """Whether the linear map needs a bias: normalization right behind it would cancel it."""
        return not (self.recipe.normalized and self.recipe.place == "before")

    def __call__(self, features: int, rank: int = 1, *, activate: bool = True) -> list[nn.Module]:
        """Return the layers that follow.

        Args:
            features: The number of channels, C.
            rank: 1 for (N, C), 2 for (N, C, H, W).
            activate: Whether the activation is among them; it is not before a residual is added.
        """
        recipe = self.recipe
        fused = self.activation if recipe.fused and activate and self._fusible else None
        norm = [norm_layer(recipe, features, rank, fused)] if recipe.normalized else []
        act = [ACTIVATIONS[self.activation]()] if activate and fused is None else []
        dropout = [nn.Dropout(_DROPPED)] if recipe.dropout and activate else []
        layers = [*norm, *act] if recipe.place == "before" else [*act, *norm]
        return [*dropout, *layers] if recipe.dropout == "before" else [*layers, *dropout]

    @property
    def _fusible(self) -> bool:
        return self.recipe.norm == "batchnorm" and self.recipe.place == "before"


def norm_layer(
    recipe: Recipe, features: int, rank: int = 1, activation: str | None = None
) -> _BatchNorm:
    """Return the normalization of a recipe.

    Args:
        recipe: How the network is made.
        features: The number of channels, C.
        rank: 1 for (N, C), 2 for (N, C, H, W).
        activation: What batchnorm's layer computes as well.
    """
    settings = {"momentum": recipe.momentum, "affine": recipe.affine != "absent"}
    if recipe.norm == "torch":
        theirs = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[rank]
        layer: _BatchNorm = theirs(features, **settings)  # type: ignore[arg-type]
    elif recipe.norm == "ghost":
        layer = bn.GhostBatchNorm(features, ghost_size=recipe.group, **settings)
    elif recipe.norm == "renormalized":
        # The schedule of the paper is for 40,000 batches: these networks see a hundredth of that.
        layer = bn.BatchRenorm(
            features, warmup_batches=50, r_batches=400, d_batches=250, **settings
        )
    else:
        ours = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d}[rank]
        layer = ours(features, activation=activation, **settings)  # type: ignore[arg-type]
    if recipe.affine == "fixed":
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
    return layer
