"""What surrounds a call: a compiler, a transform, a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

_is_traced = False


def is_compiling() -> bool:
    """Return whether `torch.compile` is tracing, and not `torch.export`."""
    if _is_traced:
        return True
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


@contextmanager
def traced() -> Iterator[None]:
    """Say that a compiler traces what is called inside, which torch does not tell of every one."""
    global _is_traced
    before, _is_traced = _is_traced, True
    try:
        yield
    finally:
        _is_traced = before


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# A compiler asks while it traces, and takes the answer for a constant: this is what
# `torch.compiler.assume_constant_result` does, which would import all of the compiler.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced_or_transformed() -> bool:
    """Return whether something looks into the call: a compiler, `torch.func`, forward mode.

    A mode that sees every operation counts, too. They are shown plain differentiable operations, or
    the operators that a compiler keeps whole, and not one closed node.
    """
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


def in_backward() -> bool:
    """Return whether a backward pass is running: a forward inside it recomputes a checkpoint."""
    return torch._C._current_graph_task_id() != -1
