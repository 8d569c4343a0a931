"""The activations that run inside the layer, with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class _Definition:
    function: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    default: float | None = None  # of the one parameter, where there is one


def _elu_backward(g: Tensor, z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 0, g, g * alpha * z.clamp(max=0).exp())


def _silu_backward(g: Tensor, z: Tensor) -> Tensor:
    s = z.sigmoid()
    return g * (s * (1 + z * (1 - s)))


def _gelu_backward(g: Tensor, z: Tensor) -> Tensor:
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return g * (0.5 * (1 + (z / math.sqrt(2)).erf()) + z * density)


def _sigmoid_backward(g: Tensor, z: Tensor) -> Tensor:
    s = z.sigmoid()
    return g * (s * (1 - s))


def _hardswish_backward(g: Tensor, z: Tensor) -> Tensor:
    return torch.where(z <= -3, 0, torch.where(z < 3, g * (z / 3 + 0.5), g))


# The gradients are functions of z, so that nothing but x need be kept for them, and are
# differentiable themselves. At their kinks they are what torch has there. Where z is NaN those of
# relu, relu6 and hardswish are g: in torch the last two are so on some places of a tensor only, and
# 0 and NaN on the others.
_DEFINITIONS = {
    "relu": _Definition(F.relu, lambda g, z: torch.where(z <= 0, 0, g)),
    "leaky_relu": _Definition(
        F.leaky_relu, lambda g, z, slope: torch.where(z > 0, g, g * slope), default=0.01
    ),
    "elu": _Definition(F.elu, _elu_backward, default=1.0),
    "silu": _Definition(F.silu, _silu_backward),
    "gelu": _Definition(F.gelu, _gelu_backward),
    "sigmoid": _Definition(torch.sigmoid, _sigmoid_backward),
    "tanh": _Definition(torch.tanh, lambda g, z: g * (1 - z.tanh().square())),
    "relu6": _Definition(F.relu6, lambda g, z: torch.where((z <= 0) | (z >= 6), 0, g)),
    "hardswish": _Definition(F.hardswish, _hardswish_backward),
}

NAMES = tuple(_DEFINITIONS)


@dataclass(frozen=True)
class Activation:
    """An elementwise function, its parameter (a slope or an alpha), and its derivative."""

    name: str
    parameter: float | None = None

    @classmethod
    def parse(cls, given: ActivationLike) -> Activation | None:
        """Return the activation that a user named: `"relu"`, or `("leaky_relu", 0.2)`.

        Raises:
            ValueError: There is no such activation, or it has no such parameter.
        """
        if given is None or isinstance(given, Activation):
            return given
        if isinstance(given, str) and given in _BY_NAME:
            return _BY_NAME[given]
        name, parameter = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if not isinstance(name, str) or name not in _DEFINITIONS:
            raise ValueError(f"activation is {given!r}: expected None or one of {', '.join(NAMES)}")
        if not isinstance(parameter, float | int | None):
            raise ValueError(f"activation is {given!r}: expected a number as its parameter")
        default = _DEFINITIONS[name].default
        if parameter is None:
            parameter = default
        elif default is None:
            raise ValueError(f"activation {name!r} has no parameter, but got {parameter!r}")
        return cls(name, parameter)

    @property
    def pair(self) -> tuple[str, float | None]:
        """Its name and its parameter."""
        return self.name, self.parameter

    @property
    def spec(self) -> str | tuple[str, float]:
        """What a user would write for it."""
        default = _DEFINITIONS[self.name].default
        if self.parameter is None or self.parameter == default:
            return self.name
        return (self.name, self.parameter)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the function of `z`, in its shape and type."""
        return _DEFINITIONS[self.name].function(z, *self._arguments)

    def backward(self, g: Tensor, z: Tensor) -> Tensor:
        """Return the gradient by `z`, given `g`, the gradient by the function's value."""
        return _DEFINITIONS[self.name].backward(g, z, *self._arguments)

    @property
    def _arguments(self) -> tuple[float, ...]:
        return () if self.parameter is None else (self.parameter,)


#: What a user names an activation by.
ActivationLike = str | tuple[str, float] | Activation | None

_BY_NAME = {name: Activation(name, made.default) for name, made in _DEFINITIONS.items()}
