"""The running statistics: how they follow a batch's moments, in one launch of one program."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.triton.programs.arithmetic import quotient, rounded


@triton.jit
def follow(
    mean, m2, counts, count, running_mean, running_var, tracked, high, low, channels,
    AVERAGE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Move them, if all of both is finite and there are values enough; count the batch if so.

    The rate is high + low, or where all batches count the same, what the number of them makes it.
    """
    n = tl.cast(count, tl.float64) if counts is None else tl.load(counts)
    if AVERAGE:
        rate = 1 / (tl.load(tracked) + 1).to(tl.float64)
    else:
        rate = tl.cast(high, tl.float64) + tl.cast(low, tl.float64)
    wrong = tl.zeros([CHANNELS], tl.int32)
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        to_mean, to_var = steps_of(
            mean, m2, n, running_mean, running_var, rate, channel, channel < channels
        )
        good = (tl.abs(to_mean) < float("inf")) & (tl.abs(to_var) < float("inf"))
        wrong = tl.where(good, wrong, 1)
    if (tl.sum(wrong, 0) == 0) & (n > 1):
        for begin in range(0, channels, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            there = channel < channels
            to_mean, to_var = steps_of(mean, m2, n, running_mean, running_var, rate, channel, there)
            at = running_mean + channel
            moved = tl.load(at, there, 0.0).to(tl.float64) + to_mean
            tl.store(at, rounded(moved, running_mean.dtype.element_ty), there)
            at = running_var + channel
            moved = tl.load(at, there, 0.0).to(tl.float64) + to_var
            tl.store(at, rounded(moved, running_var.dtype.element_ty), there)
        if tracked is not None:
            tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
def steps_of(mean, m2, n, running_mean, running_var, rate, channel, there):
    """Return by how much both statistics of some channels move."""
    var = quotient(tl.load(m2 + channel, there, 0.0), n - 1)
    to_mean = tl.load(mean + channel, there, 0.0) - tl.load(running_mean + channel, there, 0.0).to(
        tl.float64
    )
    to_var = var - tl.load(running_var + channel, there, 0.0).to(tl.float64)
    # in the type that they are kept in, in which they may not be finite
    to_mean = rounded(to_mean * rate, running_mean.dtype.element_ty).to(tl.float64)
    return to_mean, rounded(to_var * rate, running_var.dtype.element_ty).to(tl.float64)
