"""How a batch is cut into tiles and programs: what depends on its shape and the device alone.

So a result has the same bits on every run. A plan that was tuned (see `tuning`) is kept, and takes
the place of the one that is reckoned here.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.contract import Form
from batchnorm.kernels.layouts import View, steps_in, view_of

#: Offsets and counts are 32 bits wide up to here.
_NEAR = 2**31 - 2**20
#: The bytes of a tile of a program that streams: 16 a thread, twice, of 256 threads.
_TILE_BYTES = 8192
#: The bytes of a run that are fetched well: of neighbouring channels, and of places.
_RUN_BYTES = 128
#: The bytes that memory is read in at least.
_SECTOR_BYTES = 32
#: Programs a multiprocessor, of those that stream.
_CROWD = 16
#: What a program holds at most, in values: with twice as many, registers are spilled.
HELD = 8192
#: Values that are merged at a time.
_MERGED = 2048


class Cut(NamedTuple):
    """Tiles and programs of a launch.

    Attributes:
        rows: Of a tile; a power of two, as `columns`.
        columns: Of a tile.
        programs: For each unit, a channel or `columns` of them, of each group.
        warps: Of a program.
        held: Whether a program keeps its only tile from the sums to the result.
    """

    rows: int
    columns: int
    programs: int
    warps: int
    held: bool = False


class Batch(NamedTuple):
    """What batches of one shape, layout and type have in common.

    Attributes:
        view: How they collapse to one of the two layouts.
        groups: Number of groups, G.
        group: Number of outer positions in a group; the last has what is left.
        most: Number of outer positions in the largest group.
        statistics: The shape of a number a channel: (C,), or (G, C).
    """

    view: View
    groups: int
    group: int
    most: int
    statistics: tuple[int, ...]

    @property
    def width(self) -> int:
        """The length of a run."""
        return self.view.S if self.view.planar else self.view.C

    def units(self, columns: int) -> int:
        """Return how many channels, or sets of `columns` neighbouring ones, there are."""
        return self.view.C if self.view.planar else -(-self.view.C // columns)


@lru_cache(maxsize=4096)
def batch_of(
    shape: tuple[int, ...], strides: tuple[int, ...], channel_dim: int, ghost_size: int | None
) -> Batch | None:
    """Return what is needed of such batches, or None if the programs do not take them."""
    if not -len(shape) <= channel_dim < len(shape):
        return None
    view = view_of(shape, strides, channel_dim)
    if view is None or steps_in(shape, strides, view) is None or view.N * view.S > _NEAR:
        return None
    groups = Form(channel_dim, ghost_size=ghost_size).groups(shape)
    if groups is None:
        return Batch(view, 1, view.N, view.N, (view.C,))
    if groups.number > 1 and view.outer[:1] != (groups.dim,):
        return None
    if 8 * groups.number * view.C > _NEAR:  # the parts of their moments are counted by 32 bits
        return None
    each = view.N // groups.examples if groups.number > 1 else view.N
    group = groups.size * each if groups.number > 1 else view.N
    most = max(groups.lengths()) * each if groups.number > 1 else view.N
    return Batch(view, groups.number, group, most, (groups.number, view.C))


def is_far(*tensors: Tensor | None) -> bool:
    """Return whether offsets into one of these need 64 bits."""
    return any(t is not None and _reach(t) > _NEAR for t in tensors)


def _reach(tensor: Tensor) -> int:
    return sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def alignment(*numbers: int) -> int:
    """Return the power of two, up to 8, that divides all numbers."""
    return math.gcd(8, *numbers)


@lru_cache(maxsize=4096)
def reckoned(batch: Batch, itemsize: int, sms: int, held: int) -> Cut:
    """Return how a batch is cut on a device.

    Args:
        batch: What is cut.
        itemsize: The bytes of a value.
        sms: Number of multiprocessors.
        held: How many values a program may hold; 0 for none.
    """
    return _held(batch, itemsize, held) or _streaming(batch, itemsize, sms)


def _held(batch: Batch, itemsize: int, most: int) -> Cut | None:
    rows, width = _power(batch.most), batch.width
    columns = _power(width)
    if not batch.view.planar:
        columns = min(columns, max(most // rows, _SECTOR_BYTES // itemsize), _RUN_BYTES // itemsize)
    if rows * columns > most:
        return None
    return Cut(rows, columns, 1, _warps(rows * columns), held=True)


def shared(batch: Batch, itemsize: int, sms: int, most: int) -> Cut | None:
    """Return how several programs hold a channel together, or None if even all are too few.

    Args:
        batch: What is cut.
        itemsize: The bytes of a value.
        sms: Number of multiprocessors, which is that of the programs that can wait for each other.
        most: How many values a program may hold.
    """
    run = _power(batch.width)
    runs = (run,) if batch.view.planar else (_RUN_BYTES // itemsize, _SECTOR_BYTES // itemsize)
    for columns in (min(run, n) for n in runs):
        rows = most // columns
        programs = -(-batch.most // max(rows, 1))
        if rows and 1 < programs <= sms:
            return Cut(rows, columns, programs, _warps(most), held=True)
    return None


def fits(cut: Cut, batch: Batch, sms: int) -> bool:
    """Return whether a batch can be cut so on a device."""
    if min(cut[:4]) < 1 or any(n & (n - 1) for n in (cut.rows, cut.columns, cut.warps)):
        return False
    if not cut.held:
        return True
    whole = cut.rows * cut.programs >= batch.most
    return whole and cut.programs <= sms and (not batch.view.planar or cut.columns >= batch.width)


def _streaming(batch: Batch, itemsize: int, sms: int) -> Cut:
    most = _TILE_BYTES // itemsize
    columns = min(_power(batch.width), _RUN_BYTES // itemsize)
    if batch.view.planar:
        wider = [columns << i for i in range(8) if columns << i <= most]
        wider = [c for c in wider if _waste(batch.width, c) <= 1 / 16] or [
            min(_power(batch.width), most)
        ]
        columns = wider[-1]
    rows = max(1, min(_power(batch.most), most // columns))
    blocks = -(-batch.width // columns) if batch.view.planar else 1
    tiles = -(-batch.most // rows) * blocks
    wanted = -(-sms * _CROWD // (batch.units(columns) * batch.groups))
    return Cut(rows, columns, max(1, min(wanted, -(-tiles // 2))), _warps(rows * columns))


def candidates(batch: Batch, itemsize: int, sms: int, held: int) -> list[Cut]:
    """Return other cuts that may be faster, to be tried; see `reckoned`."""
    stream = _streaming(batch, itemsize, sms)
    found = [stream]
    for rows, warps in ((stream.rows * 2, 8), (stream.rows * 2, 4), (stream.rows // 2, 4)):
        if rows >= 1:
            most = max(1, rows * stream.columns // 32)
            found.append(stream._replace(rows=rows, warps=min(warps, most)))
    found += [stream._replace(programs=max(1, stream.programs * n // 4)) for n in (1, 2, 8)]
    for most in (held // 2, held, held * 2):
        found += [
            c for c in (_held(batch, itemsize, most), shared(batch, itemsize, sms, most)) if c
        ]
    return found


def _waste(width: int, columns: int) -> float:
    """Return how much of the tiles of a run lies beyond its end."""
    return -width % columns / width


def piece_of(columns: int, planar: bool, programs: int) -> int:
    """Return how many parts are merged at a time."""
    return min(_power(programs), max(16, _MERGED // (1 if planar else columns)), 512)


def _warps(values: int) -> int:
    return max(1, min(16, values // 512))


def _power(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Return how many a device has; 2 where the programs are interpreted."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
