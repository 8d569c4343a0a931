"""Forward and backward as one launch each, for batches that the registers hold: 2 and 3 passes.

A program keeps its part of a channel (or of a few neighbouring ones) from the sums to the result,
so that x, and in the backward pass dy, are read once. Where one program cannot hold all of it,
`PROGRAMS` of them share it and wait for one another in between: all of those must then be running,
which a cooperative launch of at most as many programs as there are multiprocessors sees to. They go
from one item (the channels of a group) to the next, so that the batch itself may be of any size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.triton.programs.arithmetic import (
    activated,
    give_sums,
    inverse_std_of,
    keep_moments,
    keep_sums,
    merged_moments,
    merged_sums,
    moments_around,
    moments_of,
    over_positions,
    present,
    quotient,
    scale_and_shift,
    sums_of,
    through_activation,
    through_moments,
)
from batchnorm.kernels.triton.programs.places import (
    channels_of,
    offsets_of,
    rows_of,
    tile_of,
    weights_of,
)


@triton.jit
def meet(arrived, PROGRAMS: tl.constexpr):
    """Wait until all of a number of programs are here; what they wrote before is seen then."""
    tl.debug_barrier()
    there = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    while there < PROGRAMS:
        there = tl.atomic_add(arrived, 0, sem="acq_rel")
    tl.debug_barrier()


@triton.jit
def forward(
    x, y, residual, weights, parts, arrived, mean, inverse_std, m2, counts, weight, bias,
    x_row, x_unit, y_row, y_unit, r_row, r_unit,
    rows, group, groups, channels, width,
    EPS: tl.constexpr, CORRECTION: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    PLANAR: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write y, and mean, inverse_std, m2 and counts."""
    part = tl.program_id(0) % PROGRAMS
    units = channels if PLANAR else tl.cdiv(channels, COLUMNS)
    for item in range(tl.program_id(0) // PROGRAMS, units * groups, tl.num_programs(0) // PROGRAMS):
        unit, g = item % units, item // units
        channel = channels_of(unit, PLANAR, COLUMNS)
        here = channel < channels
        first, end = rows_of(g, rows, group, groups)
        length = width * ALIGN - (0 if PLANAR else unit * COLUMNS)
        r, k, there = tile_of(part, 1, first, end, length, ROWS, COLUMNS, FAR)
        at = x + offsets_of(r, k, x_row, x_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        value = tl.load(at, there, 0.0, eviction_policy="evict_first").to(ACC)
        w = weights_of(weights, r, k, there, width, PLANAR, ALIGN, ACC)
        counted = value
        if weights is not None:
            counted = tl.where(w == 0, 0.0, value)
        count = over_positions(w, PLANAR)
        shift = quotient(over_positions(w * counted, PLANAR), count)
        one, two = moments_around(value, w, shift, PLANAR)
        if PROGRAMS == 1:
            total, middle, spread = moments_of(count, shift, one, two)
        else:
            plane = groups * channels * PROGRAMS
            own = parts + (g * PROGRAMS).to(tl.int64) * channels + channel
            keep_moments(own + part * channels, plane, here, count, shift, one, two)
            meet(arrived + item, PROGRAMS)
            total, middle, spread = merged_moments(own, plane, channels, PROGRAMS, here, PIECE)
        inverse = inverse_std_of(total, spread, EPS, CORRECTION)
        if part == 0:
            of = g * channels + channel
            tl.store(mean + of, middle, here)
            tl.store(m2 + of, spread, here)
            tl.store(inverse_std + of, inverse, here)
            if counts is not None:
                tl.store(counts + g + channel * 0, total, here & (channel == 0))

        near, scale, shift = scale_and_shift(middle, inverse, weight, bias, channel, here, ACC)
        if weights is not None:
            value = present(value, w)
        z = (value - near) * scale + shift
        if residual is not None:
            at = residual + offsets_of(r, k, r_row, r_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
            z += tl.load(at, there, 0.0, eviction_policy="evict_first").to(ACC)
        z = activated(z, ACTIVATION, PARAMETER)
        at = y + offsets_of(r, k, y_row, y_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        tl.store(at, z.to(y.dtype.element_ty), there)


@triton.jit
def backward(
    dy, x, residual, weights, dx, dresidual, parts, arrived, mean, inverse_std, weight, bias,
    sum_g, sum_g_xhat, dweight, dbias, counts, count,
    d_row, d_unit, x_row, x_unit, r_row, r_unit, dx_row, dx_unit,
    rows, group, groups, channels, width,
    CORRECTION: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    PLANAR: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write dx and dresidual, and sum g and sum g * xhat, which they depend on."""
    part = tl.program_id(0) % PROGRAMS
    units = channels if PLANAR else tl.cdiv(channels, COLUMNS)
    for item in range(tl.program_id(0) // PROGRAMS, units * groups, tl.num_programs(0) // PROGRAMS):
        unit, g = item % units, item // units
        channel = channels_of(unit, PLANAR, COLUMNS)
        here = channel < channels
        first, end = rows_of(g, rows, group, groups)
        length = width * ALIGN - (0 if PLANAR else unit * COLUMNS)
        r, k, there = tile_of(part, 1, first, end, length, ROWS, COLUMNS, FAR)
        at = dy + offsets_of(r, k, d_row, d_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        upstream = tl.load(at, there, 0.0, eviction_policy="evict_first").to(ACC)
        at = x + offsets_of(r, k, x_row, x_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        value = tl.load(at, there, 0.0, eviction_policy="evict_first").to(ACC)
        w = weights_of(weights, r, k, there, width, PLANAR, ALIGN, ACC)
        lost = w != w
        if weights is not None:
            known = present(value, w)
            lost = (w == 0) & (known != value)
            value = known
        of = g * channels + channel
        middle = tl.load(mean + of, here, 0.0)
        inverse = tl.load(inverse_std + of, here, 0.0)
        near, scale, shift = scale_and_shift(middle, inverse, weight, bias, channel, here, ACC)
        distance = tl.where(there, value - near, 0.0)
        if ACTIVATION is not None:
            z = distance * scale + shift
            if residual is not None:
                at = residual + offsets_of(r, k, r_row, r_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
                z += tl.load(at, there, 0.0, eviction_policy="evict_first").to(ACC)
            upstream = through_activation(upstream, z, ACTIVATION, PARAMETER)
        upstream = tl.where(there, upstream, 0.0)
        to = offsets_of(r, k, dx_row, dx_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        if dresidual is not None:
            tl.store(dresidual + to, upstream.to(dresidual.dtype.element_ty), there)

        total = over_positions(upstream, PLANAR)
        product = over_positions(upstream * distance, PLANAR)
        if PROGRAMS > 1:
            plane = groups * channels * PROGRAMS
            own = parts + (g * PROGRAMS).to(tl.int64) * channels + channel
            keep_sums(own + part * channels, plane, here, total, product)
            meet(arrived + item, PROGRAMS)
            total, product = merged_sums(own, plane, channels, PROGRAMS, here, PIECE)
        a, b = sums_of(total, product, middle, inverse, ACC)
        if part == 0:
            give_sums(a, b, of, channel, here, sum_g, sum_g_xhat, dweight, dbias)
        if dx is not None:
            n = count if counts is None else tl.load(counts + g)
            offset, slope = through_moments(
                a, b, n, middle, inverse, weight, channel, here, CORRECTION, ACC
            )
            back_through = distance * slope + offset
            if weights is not None:
                back_through = tl.where(w == 0, 0.0, back_through * w)
            result = tl.where(lost, 0.0, upstream * scale - back_through)
            tl.store(dx + to, result.to(dx.dtype.element_ty), there)
