"""What surrounds a call: a compiler, a transform, a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import torch
from torch.autograd import forward_ad

_tracing: set[int] = set()  # the threads in which another compiler traces


def is_compiling() -> bool:
    """Return whether `torch.compile` is tracing, and not `torch.export`."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return bool(_tracing) and get_ident() in _tracing


@contextmanager
def traced() -> Iterator[None]:
    """Say that a compiler traces what is called inside, which torch does not tell of every one."""
    thread = get_ident()
    is_first = thread not in _tracing
    _tracing.add(thread)
    try:
        yield
    finally:
        if is_first:
            _tracing.discard(thread)


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
