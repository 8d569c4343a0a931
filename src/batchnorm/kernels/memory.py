"""Where tensors lie in memory: what must be known before one of them is overwritten."""

from __future__ import annotations

import torch
from torch import Tensor


def is_same_view(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same values at the same places."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether the spans of memory overlap that two tensors reach over."""
    (begin, end), (other_begin, other_end) = _span(a), _span(b)
    return begin < other_end and other_begin < end


def apart(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return what y is computed from apart from x in memory, so that y can be written over x.

    Kernels read x and the residual at a place and then write y there. So y may lie over those, but
    over nothing of which one place is read for another.
    """
    if residual is not None and not is_same_view(x, residual):
        residual = apart_from(x, residual)
    weight, bias, mask = (
        None if other is None else apart_from(x, other) for other in (weight, bias, mask)
    )
    return weight, bias, residual, mask


def apart_from(x: Tensor, other: Tensor) -> Tensor:
    """Return a tensor, or a copy of it if it may share memory with x."""
    return other.clone() if may_overlap(x, other) else other


def written(y: Tensor, out: Tensor | None) -> Tensor:
    """Return y where it was asked for, and let autograd know what a kernel wrote to."""
    if out is None:
        return y
    if not is_same_view(y, out):
        return out.copy_(y)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def are_buffers(*tensors: Tensor | None) -> bool:
    """Return whether those that are given may be written over, as far as autograd is concerned."""
    for tensor in tensors:
        if tensor is not None and (
            tensor.is_inference() or tensor.requires_grad or tensor.is_neg()
        ):
            return False
    return True


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((size - 1) * step for size, step in steps) + 1
    return begin, begin + reach * tensor.element_size()
