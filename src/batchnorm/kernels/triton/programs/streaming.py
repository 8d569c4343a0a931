"""The four steps as programs that go through a batch tile by tile: it may be of any size.

    collect -> normalize           3 passes: x is read twice, y written
    reduce_grad -> apply_grad      5 passes: x and dy are read twice, dx written

A channel (or a few neighbouring ones) of a group is the work of `splits` programs. Each writes its
part of the sums; the last one to arrive adds all parts up, in their order, so that the result does
not depend on who is last. The second of each pair goes through the batch backwards: what the first
read last is in the cache still.
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
    over_positions,
    present,
    quotient,
    scale_and_shift,
    sums_of,
    through_activation,
    through_moments,
)
from batchnorm.kernels.triton.programs.places import (
    number_of,
    offsets_of,
    share_of,
    tile_of,
    weights_of,
)

#: How many tiles are on their way while one is worked on, and that one.
STAGES = tl.constexpr(3)


@triton.jit
def collect(
    x, weights, parts, arrived, mean, inverse_std, m2, counts,
    x_row, x_unit, rows, group, groups, channels, width, splits,
    EPS: tl.constexpr, CORRECTION: tl.constexpr,
    PLANAR: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Write mean, inverse_std and m2 of every group and channel, and the counts of the groups."""
    unit, split, g, channel, here, first, end, length, blocks, tiles = share_of(
        splits, rows, group, groups, channels, width, PLANAR, ALIGN, ROWS, COLUMNS
    )

    # the mean of the first tile that has any weight is near enough to all of them
    shift = over_positions(tl.zeros([ROWS, COLUMNS], ACC), PLANAR)
    begin = split
    weight = 0.0
    while (begin < tiles) & (weight == 0):
        r, k, there = tile_of(begin, blocks, first, end, length, ROWS, COLUMNS, FAR)
        at = x + offsets_of(r, k, x_row, x_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        w = weights_of(weights, r, k, there, width, PLANAR, ALIGN, ACC)
        value = tl.load(at, there, 0.0).to(ACC)
        if weights is not None:
            value = tl.where(w == 0, 0.0, value)
        shift = quotient(over_positions(w * value, PLANAR), over_positions(w, PLANAR))
        weight = tl.sum(tl.sum(w, 1), 0).to(tl.float32)
        if weight == 0:
            begin += splits

    number = 0
    one = tl.zeros([ROWS, COLUMNS], ACC)
    two = tl.zeros([ROWS, COLUMNS], ACC)
    three = tl.zeros([ROWS, COLUMNS], ACC)
    for t in tl.range(begin, tiles, splits, num_stages=STAGES):
        r, k, there = tile_of(t, blocks, first, end, length, ROWS, COLUMNS, FAR)
        at = x + offsets_of(r, k, x_row, x_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        distance = tl.load(at, there, 0.0).to(ACC) - shift
        if weights is None:
            distance = tl.where(there, distance, 0.0)
            number += number_of(t, blocks, first, end, length, PLANAR, ROWS, COLUMNS)
            one += distance
            two += distance * distance
        else:
            w = weights_of(weights, r, k, there, width, PLANAR, ALIGN, ACC)
            distance = tl.where(w == 0, 0.0, distance)
            one += w * distance
            two += w * distance * distance
            three += w
    count = over_positions(three, PLANAR)
    if weights is None:
        count += number.to(ACC)

    plane = groups * splits * channels
    own = parts + (g * splits).to(tl.int64) * channels + channel
    keep_moments(
        own + split * channels, plane, here,
        count, shift, over_positions(one, PLANAR), over_positions(two, PLANAR),
    )  # fmt: skip
    if _is_last(arrived + g * (tl.num_programs(0) // (groups * splits)) + unit, splits):
        total, middle, spread = merged_moments(own, plane, channels, splits, here, PIECE)
        at = g * channels + channel
        tl.store(mean + at, middle, here)
        tl.store(m2 + at, spread, here)
        tl.store(inverse_std + at, inverse_std_of(total, spread, EPS, CORRECTION), here)
        if counts is not None:
            tl.store(counts + g + channel * 0, total, here & (channel == 0))


@triton.jit
def _is_last(arrived, number):
    """Return whether all others of a number of programs were here; what they wrote is seen then."""
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1, sem="acq_rel") == number - 1


@triton.jit
def normalize(
    x, y, residual, weights, mean, inverse_std, running_var, kept_mean, kept_inverse_std,
    weight, bias,
    x_row, x_unit, y_row, y_unit, r_row, r_unit, rows, group, groups, channels, width, splits,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    PLANAR: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write y; with a running variance, also the mean and inverse_std that were used."""
    unit, split, g, channel, here, first, end, length, blocks, tiles = share_of(
        splits, rows, group, groups, channels, width, PLANAR, ALIGN, ROWS, COLUMNS
    )

    if running_var is None:
        middle = tl.load(mean + g * channels + channel, here, 0.0).to(tl.float64)
        inverse = tl.load(inverse_std + g * channels + channel, here, 0.0).to(tl.float64)
    else:
        middle = tl.load(mean + channel, here, 0.0).to(tl.float64)
        inverse = 1 / tl.sqrt(tl.load(running_var + channel, here, 1.0).to(tl.float64) + EPS)
        if (split == 0) & (g == 0):
            tl.store(kept_mean + channel, middle, here)
            tl.store(kept_inverse_std + channel, inverse, here)
    near, scale, shift = scale_and_shift(middle, inverse, weight, bias, channel, here, ACC)

    for back in tl.range(split, tiles, splits, num_stages=STAGES):
        t = tiles - 1 - back
        r, k, there = tile_of(t, blocks, first, end, length, ROWS, COLUMNS, FAR)
        at = x + offsets_of(r, k, x_row, x_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        value = tl.load(at, there, 0.0, eviction_policy="evict_first").to(ACC)
        if weights is not None:
            value = present(value, weights_of(weights, r, k, there, width, PLANAR, ALIGN, ACC))
        z = (value - near) * scale + shift
        if residual is not None:
            at = residual + offsets_of(r, k, r_row, r_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
            z += tl.load(at, there, 0.0, eviction_policy="evict_first").to(ACC)
        z = activated(z, ACTIVATION, PARAMETER)
        at = y + offsets_of(r, k, y_row, y_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        tl.store(at, z.to(y.dtype.element_ty), there)


@triton.jit
def reduce_grad(
    dy, x, residual, weights, parts, arrived, mean, inverse_std, weight, bias,
    sum_g, sum_g_xhat, dweight, dbias,
    d_row, d_unit, x_row, x_unit, r_row, r_unit,
    rows, group, groups, channels, width, splits,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    PLANAR: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Write sum g and sum g * xhat of every group and channel, and likewise dbias and dweight."""
    unit, split, g, channel, here, first, end, length, blocks, tiles = share_of(
        splits, rows, group, groups, channels, width, PLANAR, ALIGN, ROWS, COLUMNS
    )
    middle = tl.load(mean + g * channels + channel, here, 0.0)
    inverse = tl.load(inverse_std + g * channels + channel, here, 0.0)
    near, scale, shift = scale_and_shift(middle, inverse, weight, bias, channel, here, ACC)

    one = tl.zeros([ROWS, COLUMNS], ACC)
    two = tl.zeros([ROWS, COLUMNS], ACC)
    for t in tl.range(split, tiles, splits, num_stages=STAGES):
        r, k, there = tile_of(t, blocks, first, end, length, ROWS, COLUMNS, FAR)
        at = dy + offsets_of(r, k, d_row, d_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        upstream = tl.load(at, there, 0.0).to(ACC)
        at = x + offsets_of(r, k, x_row, x_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        value = tl.load(at, there, 0.0).to(ACC)
        if weights is not None:
            value = present(value, weights_of(weights, r, k, there, width, PLANAR, ALIGN, ACC))
        distance = value - near
        if ACTIVATION is not None:
            z = distance * scale + shift
            if residual is not None:
                at = residual + offsets_of(r, k, r_row, r_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
                z += tl.load(at, there, 0.0).to(ACC)
            upstream = through_activation(upstream, z, ACTIVATION, PARAMETER)
        upstream = tl.where(there, upstream, 0.0)
        one += upstream
        two += upstream * tl.where(there, distance, 0.0)

    plane = groups * splits * channels
    own = parts + (g * splits).to(tl.int64) * channels + channel
    keep_sums(
        own + split * channels, plane, here,
        over_positions(one, PLANAR), over_positions(two, PLANAR),
    )  # fmt: skip
    if _is_last(arrived + g * (tl.num_programs(0) // (groups * splits)) + unit, splits):
        total, product = merged_sums(own, plane, channels, splits, here, PIECE)
        a, b = sums_of(total, product, middle, inverse, ACC)
        at = g * channels + channel
        give_sums(a, b, at, channel, here, sum_g, sum_g_xhat, dweight, dbias)


@triton.jit
def apply_grad(
    dy, x, residual, weights, dx, dresidual, mean, inverse_std, weight, bias,
    sum_g, sum_g_xhat, counts, count,
    d_row, d_unit, x_row, x_unit, r_row, r_unit, dx_row, dx_unit,
    rows, group, groups, channels, width, splits,
    CORRECTION: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    PLANAR: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dx and dresidual; without the sums, as if the moments did not depend on x."""
    unit, split, g, channel, here, first, end, length, blocks, tiles = share_of(
        splits, rows, group, groups, channels, width, PLANAR, ALIGN, ROWS, COLUMNS
    )
    of = g * channels + channel
    middle = tl.load(mean + of, here, 0.0)
    inverse = tl.load(inverse_std + of, here, 0.0)
    near, scale, shift = scale_and_shift(middle, inverse, weight, bias, channel, here, ACC)
    offset, slope = scale * 0, scale * 0
    if sum_g is not None:
        a = tl.load(sum_g + of, here, 0.0)
        b = tl.load(sum_g_xhat + of, here, 0.0)
        n = count if counts is None else tl.load(counts + g)
        offset, slope = through_moments(
            a, b, n, middle, inverse, weight, channel, here, CORRECTION, ACC
        )

    for back in tl.range(split, tiles, splits, num_stages=STAGES):
        t = tiles - 1 - back
        r, k, there = tile_of(t, blocks, first, end, length, ROWS, COLUMNS, FAR)
        at = dy + offsets_of(r, k, d_row, d_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        upstream = tl.load(at, there, 0.0).to(ACC)
        at = x + offsets_of(r, k, x_row, x_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        value = tl.load(at, there, 0.0).to(ACC)
        w = weights_of(weights, r, k, there, width, PLANAR, ALIGN, ACC)
        known = value
        if weights is not None:
            known = present(value, w)
        distance = known - near
        if ACTIVATION is not None:
            z = distance * scale + shift
            if residual is not None:
                at = residual + offsets_of(r, k, r_row, r_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
                z += tl.load(at, there, 0.0).to(ACC)
            upstream = through_activation(upstream, z, ACTIVATION, PARAMETER)
        at = offsets_of(r, k, dx_row, dx_unit, unit, PLANAR, COLUMNS, FAR, ALIGN)
        if dresidual is not None:
            tl.store(dresidual + at, upstream.to(dresidual.dtype.element_ty), there)
        if dx is not None:
            result = upstream * scale
            if sum_g is not None:
                back_through = distance * slope + offset
                if weights is not None:
                    back_through = tl.where(w == 0, 0.0, back_through * w)
                result -= back_through
            if weights is not None:
                result = tl.where((w == 0) & (known != value), 0.0, result)
            tl.store(dx + at, result.to(dx.dtype.element_ty), there)
