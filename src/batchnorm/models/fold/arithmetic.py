"""The arithmetic of folding, in float64: rounded once, at the end.

A batch norm in evaluation is an affine map of each channel,

    y = scale * x + shift        scale = weight / sqrt(var + eps)    shift = bias - mean * scale

so after a linear map z = W x + b it is another one, and before it, too:

    scale * (W x + b) + shift = (scale W) x + (scale b + shift)
    W (scale * x + shift) + b = (W scale) x + (b + W shift)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from batchnorm.models.fold.graph import Map, Norm


def scale_and_shift(norm: Norm, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the affine map of each channel that a batch norm is.

    Args:
        norm: The batch norm.
        tensors: The tensors of the model.
    """
    mean, var, weight, bias = (
        None if name is None else tensors[name].detach().to("cpu", torch.float64).reshape(-1)
        for name in norm.names
    )
    assert mean is not None  # or else there were nothing to fold
    assert var is not None
    scale = (var + norm.eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


class Folding:
    """The weight and the bias that a linear map will have.

    Args:
        op: The linear map.
        tensors: The tensors of the model.

    Attributes:
        op: The linear map.
        weight: Its weight as the model has it, in float64.
        bias: Its bias; None as long as it needs none.
    """

    def __init__(self, op: Map, tensors: Mapping[str, Tensor]) -> None:
        self.op, self.dtype = op, tensors[op.weight].dtype
        self.weight = tensors[op.weight].detach().to("cpu", torch.float64, copy=True).contiguous()
        self.bias: Tensor | None = None
        if op.bias is not None:
            self.bias = tensors[op.bias].detach().to("cpu", torch.float64, copy=True)

    def copy(self) -> Folding:
        """Return another one, to try what comes of it."""
        new = Folding.__new__(Folding)
        new.__dict__.update(self.__dict__)
        new.weight = self.weight.clone()
        return new

    def fold(self, scale: Tensor, shift: Tensor, before: bool) -> None:
        """Take in the affine map of each channel, before this map or after it.

        Args:
            scale: What each channel is multiplied by.
            shift: What is added to it then.
            before: Whether the channels are those of the input.
        """
        weight = self._by_channels()
        groups = weight.shape[0]
        bias = weight.new_zeros(groups * weight.shape[1]) if self.bias is None else self.bias
        if before:
            bias = bias + (weight.sum(-1) * shift.view(groups, 1, -1)).sum(-1).reshape(-1)
            weight *= scale.view(groups, 1, -1, 1)
        else:
            weight *= scale.view(groups, -1, 1, 1)
            bias = scale * bias + shift
        if self.bias is not None or bool((bias != 0).any()):
            self.bias = bias

    def is_finite(self) -> bool:
        """Return whether both can be had in the type that the weight has."""
        return all(
            bool(values.to(self.dtype).isfinite().all())
            for values in (self.weight, self.bias)
            if values is not None
        )

    def _by_channels(self) -> Tensor:
        """Return a view of the weight: groups, outputs and inputs of each, kernel."""
        op, weight = self.op, self.weight
        grouped = weight.view(op.groups, weight.shape[0] // op.groups, weight.shape[1], -1)
        return grouped.transpose(1, 2) if op.transposed else grouped
