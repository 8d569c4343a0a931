"""What compiled code must ask when it runs, and not when it is traced.

A compiler sees the layer once. It cannot know then whether a call will be the recomputation of a
checkpoint, and it may keep a buffer for the backward pass where a copy was asked for. Two operators
that it does not look into settle that. An exported graph has neither, so that it runs without this
package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_compiling() -> bool:
    """Return whether `torch.compile` is tracing, and not `torch.export`."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def in_backward() -> bool:
    """Return whether a backward pass is running: a forward inside it recomputes a checkpoint."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("batchnorm::is_recomputation", mutates_args=())
def is_recomputation(like: Tensor) -> Tensor:
    """Return `in_backward()` at the time of the call, as a scalar on the device of `like`."""
    return torch.full((), in_backward(), device=like.device)


@is_recomputation.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


@torch.library.custom_op("batchnorm::snapshot", mutates_args=())
def snapshot(buffer: Tensor) -> Tensor:
    """Return a copy of a buffer that autograd may keep while the buffer itself changes."""
    return buffer.detach().clone()


@snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)
