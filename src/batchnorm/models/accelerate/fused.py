"""What takes the place of a chain in a graph: one call of the layer's function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.wrap import TagActivationCheckpoint
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchnorm.functional import batch_norm, in_backward
from batchnorm.kernels import Activation, are_there
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
    noted: bool = False,
) -> Tensor:
    """Return activation(batch_norm(input) + residual), as the nodes of the graph did, in one call.

    Where there are no kernels for the input, those of torch are called one after the other, but not
    where the backward pass is to make the result again, which it could not do of theirs.

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
        noted: Whether it is noted how the backward pass can make the result again.
    """
    function = None if activation is None else Activation(*activation)
    if noted or are_there(input):
        y = batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, activation=function,
        )  # fmt: skip
        return note_batch_norm(y, input, weight, bias, residual) if noted else y
    if training and in_backward():  # a checkpoint is recomputed: they have moved already
        running_mean, running_var = _copy(running_mean), _copy(running_var)
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = torch.add(y, residual)
    return y if function is None else function(y)


def _copy(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.clone()


def operator_noted(*arguments: Any) -> tuple[Tensor, ...]:
    """Return what the operator of our layers does, and note how y can be made again."""
    result: tuple[Tensor, ...] = torch.ops.batchnorm.forward.default(*arguments)
    note_operator(result, *arguments)
    return result


def add_once(count: Tensor, *numbers: Any, **options: Any) -> Tensor:
    """Add to a count of batches in place, except where a checkpoint is recomputed."""
    return count if in_backward() else count.add_(*numbers, **options)


def checkpointed(body: fx.GraphModule, *inputs: Any, **options: Any) -> Any:
    """Return what a part of the graph does, under `torch.utils.checkpoint`.

    To that, running statistics are what the part has, as in a module, and no inputs, which may not
    have moved when it is done again.
    """
    divide: Any = TagActivationCheckpoint.divide_kwargs
    found, keywords = divide(options)
    found["use_reentrant"] = False
    if "_checkpoint_context_fn" in body.meta:
        found["context_fn"] = body.meta["_checkpoint_context_fn"]
    moved = {at: inputs[at] for at in body.meta["batchnorm_moved"]}

    def part(*inputs: Any, **keywords: Any) -> Any:
        return body(*(moved.get(at, value) for at, value in enumerate(inputs)), **keywords)

    given = (None if at in moved else value for at, value in enumerate(inputs))
    return checkpoint(part, *given, **found, **keywords)
