"""The same normalization by the equations, by `torch.nn` and by batchnorm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import reference

EPS = 1e-5  # by default in the layers of both

_Kinds = Mapping[int, Callable[..., nn.modules.batchnorm._BatchNorm]]


def _by_reference(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = EPS) -> Tensor:
    arrays = (value.double().numpy() for value in (x, gamma, beta))
    return torch.from_numpy(reference.forward(*arrays, eps=eps))


def _by_layer(kinds: _Kinds, x: Tensor, gamma: Tensor, beta: Tensor, eps: float = EPS) -> Tensor:
    layer = kinds[x.ndim](x.shape[1], eps=eps).to(x.dtype)
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(beta)
        normalized: Tensor = layer(x)
    return normalized


#: By its name: what normalizes x, (N, C) or (N, C, H, W), by its own moments, with gamma and beta.
#: The reference computes in float64, whatever the type of x.
NORMALIZE: Mapping[str, Callable[..., Tensor]] = {
    "reference": _by_reference,
    "torch.nn": partial(_by_layer, {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}),
    "batchnorm": partial(_by_layer, {2: bn.BatchNorm1d, 4: bn.BatchNorm2d}),
}


def furthest(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two batches of one shape, in float64.

    Example:
        >>> furthest(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]))
        0.5
    """
    return float((a.double() - b.double()).abs().max())
