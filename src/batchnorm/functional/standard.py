"""Inference as torch's own batch norm, which every tool and runtime that reads a graph knows.

Elementary operations would compute the same, but who folds batch norms into convolutions, or has a
kernel for them, would not find one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.functional.surroundings import is_transformed
from batchnorm.kernels import Form
from batchnorm.moments import present

#: Those that torch's batch norm keeps.
_LAYOUTS = torch.contiguous_format, torch.channels_last, torch.channels_last_3d


def serves(x: Tensor) -> bool:
    """Return whether a call that normalizes by running statistics is shown as torch's own.

    It is to a compiler and to `torch.export`. What is transformed has to be plain, and so have
    batches of subclasses that take operations apart themselves.

    Args:
        x: The batch.
    """
    return (
        torch.compiler.is_compiling()
        and not is_transformed()
        and not hasattr(type(x), "__tensor_flatten__")
    )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    running: tuple[Tensor, Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """Return y: one call of `torch.nn.functional.batch_norm`, and what follows it.

    That call takes the channels in dimension 1, and per-channel tensors of one type: that of the
    batch, or float32 beside a half type. What follows it in half types is computed in float32, so
    that y is rounded once.

    Args:
        x: The batch, checked.
        weight: gamma, (C,), or None.
        bias: beta, (C,), or None.
        residual: Added before the activation, or None.
        mask: The weights of the positions, of the rank of `x`, or None.
        form: What does not change from call to call.
        running: (mean, var) to normalize by.
        out: Where y goes, maybe over `x`, or None for new memory.
    """
    follows = residual is not None or form.activation is not None
    # torch.promote_types would be a node of an exported graph
    wide = max(torch.float32, x.dtype, running[0].dtype, key=lambda dtype: dtype.itemsize)
    z = x if mask is None else present(x, mask)
    if x.dtype.itemsize != 2 or wide != torch.float32 or follows:
        z = _to(z, wide)
    z = _batch_norm(z, weight, bias, form, running, wide)
    if residual is not None:
        z = z + _to(residual, wide)
    if form.activation is not None:
        z = form.activation(z)
    y = _to(z, x.dtype)
    if out is None and y.stride() != x.stride():
        out = torch.empty_like(x)
    return y if out is None else out.copy_(y)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    running: tuple[Tensor, Tensor],
    wide: torch.dtype,
) -> Tensor:
    """Return weight * (x - mean) / sqrt(var + eps) + bias, with per-channel tensors of one type."""
    mean, var = (_to(v, wide) for v in running)
    weight, bias = (None if v is None else _to(v, wide) for v in (weight, bias))
    dim, last = form.channel_dim % x.ndim, x.ndim - 1
    moved = x
    if x.ndim == 1:
        moved = x.unsqueeze(0)
    elif dim == last > 1:
        moved = x.flatten(0, -2)  # which leaves the memory as it is, and so it is left
    elif dim != 1:
        moved = x.movedim(dim, 1)
    if not any(moved.is_contiguous(memory_format=layout) for layout in _LAYOUTS):
        moved = moved.contiguous()  # as it does anyway, and says otherwise to who traces it
    z = F.batch_norm(moved, mean, var, weight, bias, False, 0.0, form.eps)
    if x.ndim == 1:
        return z.squeeze(0)
    if dim == last > 1:
        return z.view(x.shape)
    return z if dim == 1 else z.movedim(1, dim)


def _to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `.to` does, which a compiler would note as a call even where it does nothing."""
    return values if values.dtype == dtype else values.to(dtype)
