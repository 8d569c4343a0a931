"""Frozen batch normalization: the running statistics and nothing that learns."""

from __future__ import annotations

from typing import Any

from batchnorm.layers.batch_norm import BatchNorm


class FrozenBatchNorm(BatchNorm):
    """Batch normalization that is an affine map of each channel, in training as in evaluation.

        y = weight * (x - running_mean) / sqrt(running_var + eps) + bias

    It is `BatchNorm` with `statistics="running"`, `update="never"`, and a weight and bias that
    require no gradient; the state dict is that of `BatchNorm`, so the statistics and parameters of
    a trained layer load into it. `freeze` makes one of a layer in place, and `unfreeze` undoes it.

    Args:
        num_features: Number of channels, C.
        args: As of `BatchNorm`.
        settings: As of `BatchNorm`.

    Shape:
        - input, residual, output: those of `BatchNorm`

    Raises:
        ValueError: A setting cannot be.

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.FrozenBatchNorm(3)
        >>> x = torch.randn(8, 3)
        >>> torch.equal(layer.train()(x), layer.eval()(x))
        True
    """

    def __init__(self, num_features: int, *args: Any, **settings: Any) -> None:
        fixed = {"statistics": "running", "update": "never"}
        super().__init__(num_features, *args, **{**fixed, **settings})
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
