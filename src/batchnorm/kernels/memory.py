"""Where tensors lie in memory: what must be known before one of them is overwritten."""

from __future__ import annotations

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


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((size - 1) * step for size, step in steps) + 1
    return begin, begin + reach * tensor.element_size()
