"""Where a program works: its channels, its group, and the tiles of its part of the batch.

A batch is rows of runs: an example's values of one channel, which are as many as it has places
(planar), or the channels of one position (see `kernels.layouts`). A tile is ROWS of those by
COLUMNS of their values. A program has one channel, or COLUMNS neighbouring ones, and goes through
every n-th tile of a group, so that the programs advance through memory side by side.

Steps between rows and channels, and the lengths of runs, are given divided by ALIGN: what Triton
knows to be a multiple of that, it loads in one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channels_of(unit, PLANAR: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the channels of a program, (1, W)."""
    if PLANAR:
        channel = unit + tl.arange(0, 1)[None, :]
    else:
        channel = unit * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return channel


@triton.jit
def rows_of(g, rows, group, groups):
    """Return the first row of a group, and the one after its last; the last has all the rest."""
    first = g * group
    return first, tl.where(g == groups - 1, rows, first + group)


@triton.jit
def share_of(
    splits, rows, group, groups, channels, width,
    PLANAR: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return what is a program's own, where `splits` of them share the tiles of a unit and group.

    That is unit, split and group; its channels, and which of them there are; the first row of its
    group and the one after the last; how long its part of a run is; how many tiles lie side by side
    in that, and how many there are in all. Neighbours have neighbouring channels.
    """
    units = channels if PLANAR else tl.cdiv(channels, COLUMNS)
    item = tl.program_id(0)
    unit, rest = item % units, item // units
    split, g = rest % splits, rest // splits
    channel = channels_of(unit, PLANAR, COLUMNS)
    first, end = rows_of(g, rows, group, groups)
    length = width * ALIGN
    blocks = tl.cdiv(length, COLUMNS)
    if not PLANAR:
        length -= unit * COLUMNS
        blocks = 1
    tiles = tl.cdiv(end - first, ROWS) * blocks
    return unit, split, g, channel, channel < channels, first, end, length, blocks, tiles


@triton.jit
def tile_of(
    t, blocks, first, end, length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Return rows, columns and which of its places there are, of a tile."""
    rows = first + (t // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (t % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (rows < end) & (columns < length)
    if FAR:
        rows = rows.to(tl.int64)
    return rows, columns, there


@triton.jit
def offsets_of(
    rows, columns, row_step, unit_step, unit,
    PLANAR: tl.constexpr, COLUMNS: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return where the places of a tile lie in a tensor."""
    if FAR:
        unit = unit.to(tl.int64)
        row_step = tl.cast(row_step, tl.int64)
        unit_step = tl.cast(unit_step, tl.int64)
    start = unit * COLUMNS
    if PLANAR:
        start = unit * (unit_step * ALIGN)
    return start + rows * (row_step * ALIGN) + columns


@triton.jit
def weights_of(
    weights, rows, columns, there, width,
    PLANAR: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the weights of the positions of a tile; 0 of places that are not there."""
    if weights is None:
        w = there.to(ACC)
    else:
        at = rows * (width * ALIGN) + columns if PLANAR else rows + columns * 0
        w = tl.load(weights + at, there, 0.0).to(ACC)
    return w


@triton.jit
def number_of(
    t, blocks, first, end, length,
    PLANAR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return how many values of a channel a tile has."""
    number = tl.minimum(ROWS, end - first - (t // blocks) * ROWS)
    if PLANAR:
        number *= tl.minimum(COLUMNS, length - (t % blocks) * COLUMNS)
    return number
