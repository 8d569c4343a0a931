"""What remains of a batch norm that was folded: its activation, what is added to it, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from batchnorm.kernels import Activation
from batchnorm.layers import BatchNorm

_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


class AddActivation(nn.Module):
    """What a layer with a residual does without its normalization.

        y = activation(x + residual)

    Args:
        activation: The activation.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: None = None) -> Tensor:
        """Return the sum, activated.

        Args:
            input: What the layer before returns, normalized.
            residual: Added to it, if there is one.
            mask: There is none: a layer that is called with one is not folded.
        """
        output: Tensor = self.activation(input if residual is None else input + residual)
        return output


def what_remains(layer: nn.Module, takes_more: bool) -> nn.Module:
    """Return what a batch norm does beside normalizing.

    Args:
        layer: The batch norm.
        takes_more: Whether it is called with more than a batch.
    """
    remains: nn.Module = nn.Identity()
    if not isinstance(layer, BatchNorm):
        return remains
    activation = Activation.parse(layer.activation)
    if activation is not None:
        name, parameter = activation.pair
        remains = _ACTIVATIONS[name](*([] if parameter is None else [parameter]))
    return AddActivation(remains) if takes_more else remains


def replace(layer: nn.Module, new: nn.Module) -> None:
    """Make of a layer what another one is, with its hooks, wherever it is referred to."""
    hooks = {name: value for name, value in layer.__dict__.items() if "hook" in name}
    layer.__dict__.clear()
    layer.__dict__.update({**new.eval().__dict__, **hooks})
    layer.__class__ = new.__class__
