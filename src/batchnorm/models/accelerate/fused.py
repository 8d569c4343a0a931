"""What takes the place of a chain in a graph: one call of the layer's function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.wrap import TagActivationCheckpoint
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchnorm.functional import batch_norm, in_backward
from batchnorm.kernels import Activation, native
from batchnorm.models.accelerate.recompute import note_batch_norm, note_operator


def fused(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    activation: tuple[str, float | None] | None = None,
) -> Tensor:
    """Return activation(batch_norm(input) + residual), as the nodes of the graph did, in one call.

    Where there are no kernels for the input, those of torch are called one after the other.

    Args:
        input: As of `torch.nn.functional.batch_norm`, with the next seven.
        running_mean: See there.
        running_var: See there.
        weight: See there.
        bias: See there.
        training: See there.
        momentum: See there.
        eps: See there.
        residual: Added before the activation, or None.
        activation: Its name and its parameter, or None.
    """
    function = None if activation is None else Activation(*activation)
    if native.takes(input):
        return batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, activation=function,
        )  # fmt: skip
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = torch.add(y, residual)
    return y if function is None else function(y)


def fused_noted(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    activation: tuple[str, float | None] | None = None,
) -> Tensor:
    """Return what `fused` does, and note how the backward pass can make it again."""
    y = fused(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual,
        activation,
    )  # fmt: skip
    return note_batch_norm(y, input, weight, bias, residual)


def operator_noted(*arguments: Any) -> tuple[Tensor, ...]:
    """Return what the operator of our layers does, and note how y can be made again."""
    result: tuple[Tensor, ...] = torch.ops.batchnorm.forward.default(*arguments)
    note_operator(result, *arguments)
    return result


def add_once(values: Tensor, other: Any) -> Tensor:
    """Add in place; a scalar integer, which counts batches, only where no checkpoint recomputes."""
    if values.ndim == 0 and not values.is_floating_point() and in_backward():
        return values
    return values.add_(other)


def checkpointed(body: fx.GraphModule, *inputs: Any, **options: Any) -> Any:
    """Return what a part of the graph does, under `torch.utils.checkpoint`."""
    divide: Any = TagActivationCheckpoint.divide_kwargs
    found, keywords = divide(options)
    found["use_reentrant"] = False
    if "_checkpoint_context_fn" in body.meta:
        found["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *inputs, **found, **keywords)
