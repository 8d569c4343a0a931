"""The running statistics on a GPU: how they follow a batch's moments."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from batchnorm.kernels.memory import are_buffers
from batchnorm.kernels.triton.device import TYPES, programs, start, takes
from batchnorm.kernels.triton.launches import WIDE, counted, counts_of
from batchnorm.moments import Moments

#: How many channels are moved at a time.
_CHANNELS = 1024


def follow(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
) -> bool:
    """Move the running statistics towards a batch's moments, if these tensors can be: in one call.

    Returns False, and does nothing, if they cannot.
    """
    mean = moments.mean
    kept = [v for v in (running_mean, running_var, num_batches_tracked) if v is not None]
    if not takes(mean) or mean.dtype != WIDE or mean.ndim != 1 or not are_buffers(*kept):
        return False
    if any(v.device != mean.device or not v.is_contiguous() for v in kept):
        return False
    if running_mean.dtype not in TYPES or running_var.dtype not in TYPES:
        return False
    if not running_mean.shape == running_var.shape == moments.m2.shape == mean.shape:
        return False
    if num_batches_tracked is not None and num_batches_tracked.numel() != 1:
        return False
    move(running_mean, running_var, moments, momentum, num_batches_tracked)
    torch.autograd.graph.increment_version(kept)
    return True


def move(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | None,
    tracked: Tensor | None,
) -> None:
    """Move the running statistics in one launch; `follow` sees whether they can be."""
    rate = momentum or 0.0
    high = struct.unpack("f", struct.pack("f", rate))[0]  # numbers are given in float32
    mean = moments.mean.contiguous()
    start(
        programs()[2].follow, 1, mean, mean=mean, m2=moments.m2.contiguous(),
        **counted(counts_of(moments.count, mean)),
        running_mean=running_mean, running_var=running_var, tracked=tracked,
        high=high, low=rate - high, channels=len(mean),
        AVERAGE=momentum is None, CHANNELS=_CHANNELS, num_warps=4,
    )  # fmt: skip
