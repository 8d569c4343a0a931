"""How the dimensions of a batch lie in memory: what kernels need to know of it."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """A batch as N outer positions, C channels and S inner positions.

    Attributes:
        planar: Whether runs are of one channel, `S` contiguous values, or of one position, `C`
            contiguous values; S is then 1.
        N: Number of outer positions.
        C: Number of channels.
        S: Number of inner positions.
        outer: Dimensions that make up N, in the order of memory.
        inner: Dimensions that make up S, likewise.
        channel: The channels' dimension.
    """

    planar: bool
    N: int
    C: int
    S: int
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    channel: int


def _collapsed(shape: tuple[int, ...], strides: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """Return the step of dimensions that are one in memory, the outermost first; -1 if not one."""
    for before, after in pairwise(dims):
        if strides[before] != strides[after] * shape[after]:
            return -1
    return strides[dims[-1]] if dims else 0


@lru_cache(maxsize=4096)
def view_of(shape: tuple[int, ...], strides: tuple[int, ...], channel: int) -> View | None:
    """Return how a batch collapses to one of the two layouts, or None if it does not."""
    channel %= len(shape)
    C = shape[channel]
    if 0 in shape:
        positions = math.prod(shape[:channel]) * math.prod(shape[channel + 1 :])
        return View(False, positions, C, 1, (), (), channel)
    if not is_apart(shape, strides):  # results, which are, would lie otherwise
        return None
    dims = tuple(d for d, size in enumerate(shape) if size > 1 and d != channel)
    dims = tuple(sorted(dims, key=lambda d: -strides[d]))
    sizes = [shape[d] for d in dims]
    if (C == 1 or strides[channel] == 1) and _collapsed(shape, strides, dims) >= (
        C if C > 1 else 2
    ):
        return View(False, math.prod(sizes), C, 1, dims, (), channel)
    if C > 1 and strides[channel] == 1 and not dims:
        return View(False, 1, C, 1, (), (), channel)
    for cut in range(len(dims) + 1):  # the inner positions are as many dimensions as collapse
        outer, inner = dims[:cut], dims[cut:]
        if _collapsed(shape, strides, outer) >= 0 and _collapsed(shape, strides, inner) in (0, 1):
            if inner and strides[inner[-1]] != 1:
                continue
            if not inner and dims:
                break
            N, S = math.prod(sizes[:cut]), math.prod(sizes[cut:])
            return View(True, N, C, S, outer, inner, channel)
    return None


@lru_cache(maxsize=4096)
def steps_in(
    shape: tuple[int, ...], strides: tuple[int, ...], view: View
) -> tuple[int, int] | None:
    """Return the steps from outer position to the next, and from channel to channel, of a tensor.

    None if its dimensions do not collapse as those of the view.
    """
    if 0 in shape:
        return 0, 0
    outer = _collapsed(shape, strides, view.outer)
    inner = _collapsed(shape, strides, view.inner)
    channel = strides[view.channel] if view.C > 1 else 0
    if outer < 0 or inner < 0:
        return None
    if view.planar:
        return (outer, channel) if inner == 1 or view.S == 1 else None
    return (outer, 0) if channel == 1 or view.C == 1 else None


@lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether a tensor fills the memory that it spans, each place once."""
    reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    return 0 not in shape and reach == math.prod(shape) and is_apart(shape, strides)


def is_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether every value of a tensor has a place in memory of its own.

    A yes is certain; a no may also be said of rare tensors whose dimensions interlock.
    """
    end = 1
    for step, size in sorted((step, n) for n, step in zip(shape, strides, strict=True) if n > 1):
        if step < end:
            return False
        end += step * (size - 1)
    return True


def fitting(tensor: Tensor, x: Tensor, view: View) -> Tensor:
    """Return a tensor in the shape of a batch, or a copy of it that collapses as the batch does."""
    if steps_in(tensor.shape, tensor.stride(), view) is None or tensor.is_neg():
        return torch.empty_like(x).copy_(tensor)
    return tensor


def in_order(mask: Tensor, x: Tensor, view: View) -> Tensor:
    """Return the weights of the positions in the order of the view, in the type of arithmetic."""
    sizes = list(x.shape)
    sizes[view.channel] = 1
    ordered = mask.expand(sizes).permute(
        *view.outer, *view.inner, *(d for d in range(x.ndim) if d not in view.outer + view.inner)
    )
    return ordered.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
