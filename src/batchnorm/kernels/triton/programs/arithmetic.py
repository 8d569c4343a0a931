"""What the programs compute of values in registers: activations, and the merge of moments.

A number a channel is a row, (1, W): W is 1 where a program has one channel, so that one text does
for both layouts. Sums over the positions go over the rows, and there over the columns, too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(z):
    """Return exp(z) - 1, whose digits the subtraction would take where z is near 0."""
    series = 1 + z / 13
    for n in tl.static_range(12, 1, -1):
        series = 1 + z / n * series
    return tl.where(tl.abs(z) < 0.35, z * series, tl.exp(z) - 1)


@triton.jit
def tanh(z):
    """Return the hyperbolic tangent."""
    falling = expm1(-2 * tl.abs(z))
    size = -falling / (2 + falling)
    return tl.where(z < 0, -size, size)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr):
    """Return the activation of z; what is NaN stays so."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * PARAMETER)
    elif ACTIVATION == "elu":
        z = tl.where(z > 0, z, expm1(tl.where(z > 0, 0.0, z)) * PARAMETER)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "sigmoid":
        z = tl.sigmoid(z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3, 0.0), 6.0) / 6
    else:
        tl.static_assert(ACTIVATION is None)
    return z


@triton.jit
def through_activation(g, z, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr):
    """Return the gradient by z, given g, that by the activation of z."""
    if ACTIVATION == "relu":
        g = tl.where(z <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(z > 0, g, g * PARAMETER)
    elif ACTIVATION == "elu":
        g = tl.where(z > 0, g, g * PARAMETER * tl.exp(tl.where(z > 0, 0.0, z)))
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        g = g * (s * (1 + z * (1 - s)))
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        g = g * (0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(z)
        g = g * (s * (1 - s))
    elif ACTIVATION == "tanh":
        falling = tl.exp(-2 * tl.abs(z))
        g = g * (4 * falling / ((1 + falling) * (1 + falling)))
    elif ACTIVATION == "relu6":
        g = tl.where((z <= 0) | (z >= 6), 0.0, g)
    elif ACTIVATION == "hardswish":
        g = tl.where(z <= -3, 0.0, tl.where(z < 3, g * (z / 3 + 0.5), g))
    else:
        tl.static_assert(ACTIVATION is None)
    return g


@triton.jit
def over_positions(values, PLANAR: tl.constexpr):
    """Return the sum over the positions of a tile: a number a channel."""
    if PLANAR:
        values = tl.sum(values, 1, keep_dims=True)
    return tl.sum(values, 0, keep_dims=True)


@triton.jit
def quotient(values, count):
    """Return values / count, and 0 where the count is not positive."""
    some = count > 0
    return tl.where(some, values / tl.where(some, count, 1.0), 0.0)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Return a value in another type: in a half type by way of float32."""
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def present(value, w):
    """Return the values, with 0 for what has no weight and is not finite."""
    return tl.where((w == 0) & ~(tl.abs(value) < float("inf")), 0.0, value)


@triton.jit
def moments_around(value, w, shift, PLANAR: tl.constexpr):
    """Return the sums of weight * distance and of its square, around a shift."""
    distance = tl.where(w == 0, 0.0, value - shift)  # 0 * inf is NaN
    first = w * distance
    return over_positions(first, PLANAR), over_positions(first * distance, PLANAR)


@triton.jit
def keep_moments(to, plane, there, count, shift, first, second):
    """Write what a program found: its part of the moments."""
    tl.store(to, count, mask=there)
    tl.store(to + plane, shift, mask=there)
    tl.store(to + 2 * plane, first, mask=there)
    tl.store(to + 3 * plane, second, mask=there)


@triton.jit
def merged_moments(parts, plane, step, number, there, PIECE: tl.constexpr):
    """Return count, mean and m2 of all parts, in float64; each part is around a shift of its own.

    All is taken from one of these shifts, so that the float32 of the distances is enough. What
    other programs wrote is not in the nearest cache.
    """
    top = tl.where(there, float("-inf"), float("-inf")).to(parts.dtype.element_ty)
    pieces = tl.arange(0, PIECE)[:, None]
    for begin in range(0, number, PIECE):
        at = parts + (begin + pieces) * step
        here = (begin + pieces < number) & there
        count = tl.load(at, here, 0.0, cache_modifier=".cg")
        shift = tl.load(at + plane, here, 0.0, cache_modifier=".cg")
        shift = tl.where(count > 0, shift, float("-inf"))
        top = tl.maximum(top, tl.max(shift, 0, keep_dims=True))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros_like(top).to(tl.float64)
    weighted = tl.zeros_like(top)
    for begin in range(0, number, PIECE):
        at = parts + (begin + pieces) * step
        here = (begin + pieces < number) & there
        count = tl.load(at, here, 0.0, cache_modifier=".cg")
        shift = tl.load(at + plane, here, 0.0, cache_modifier=".cg")
        first = tl.load(at + 2 * plane, here, 0.0, cache_modifier=".cg")
        part = tl.where(count > 0, count * (shift - top) + first, 0.0)
        weighted += tl.sum(part, 0, keep_dims=True)
        total += tl.sum(count.to(tl.float64), 0, keep_dims=True)
    offset = quotient(weighted, total.to(top.dtype))
    m2 = tl.zeros_like(top)
    for begin in range(0, number, PIECE):
        at = parts + (begin + pieces) * step
        here = (begin + pieces < number) & there
        count = tl.load(at, here, 0.0, cache_modifier=".cg")
        shift = tl.load(at + plane, here, 0.0, cache_modifier=".cg")
        first = tl.load(at + 2 * plane, here, 0.0, cache_modifier=".cg")
        second = tl.load(at + 3 * plane, here, 0.0, cache_modifier=".cg")
        rest = quotient(first, count)
        own = second - first * rest
        own = tl.where(own < 0, 0.0, own)
        between = (shift - top) + rest - offset
        part = tl.where(count > 0, own + count * between * between, 0.0)
        m2 += tl.sum(part, 0, keep_dims=True)
    return total, top.to(tl.float64) + offset.to(tl.float64), m2.to(tl.float64)


@triton.jit
def merged_sums(parts, plane, step, number, there, PIECE: tl.constexpr):
    """Return the two sums over all parts."""
    one = tl.where(there, 0.0, 0.0).to(parts.dtype.element_ty)
    other = one
    pieces = tl.arange(0, PIECE)[:, None]
    for begin in range(0, number, PIECE):
        at = parts + (begin + pieces) * step
        here = (begin + pieces < number) & there
        one += tl.sum(tl.load(at, here, 0.0, cache_modifier=".cg"), 0, keep_dims=True)
        other += tl.sum(tl.load(at + plane, here, 0.0, cache_modifier=".cg"), 0, keep_dims=True)
    return one, other


@triton.jit
def inverse_std_of(count, m2, EPS: tl.constexpr, CORRECTION: tl.constexpr):
    """Return 1 / sqrt(var + eps) in float64; 0 where there are no values to normalize by."""
    var = quotient(m2, count - CORRECTION)
    return tl.where(count > 0, 1 / tl.sqrt(var + EPS), 0.0)


@triton.jit
def split_mean(mean, ACC: tl.constexpr):
    """Return the mean as two numbers: in the type of the arithmetic, and what is left."""
    near = mean.to(ACC)
    return near, mean - near.to(tl.float64)


@triton.jit
def scale_and_shift(mean, inverse_std, weight, bias, channel, here, ACC: tl.constexpr):
    """Return near, scale and shift: z = (x - near) * scale + shift."""
    near, rest = split_mean(mean, ACC)
    scale = inverse_std
    if weight is not None:
        scale *= tl.load(weight + channel, here, 0.0).to(tl.float64)
    shift = -rest * scale
    if bias is not None:
        shift += tl.load(bias + channel, here, 0.0).to(tl.float64)
    return near, scale.to(ACC), shift.to(ACC)


@triton.jit
def through_moments(
    a, b, count, mean, inverse_std, weight, channel, here,
    CORRECTION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return offset and slope: offset + slope * (x - near) flows back through the moments."""
    _, rest = split_mean(mean, ACC)
    scale = inverse_std
    if weight is not None:
        scale *= tl.load(weight + channel, here, 0.0).to(tl.float64)
    count = tl.cast(count, tl.float64)
    slope = scale * quotient(b, count - CORRECTION) * inverse_std
    offset = scale * quotient(a, count) - slope * rest
    return offset.to(ACC), slope.to(ACC)


@triton.jit
def moments_of(count, shift, first, second):
    """Return count, mean and m2 of a single part, in float64."""
    rest = quotient(first, count)
    own = second - first * rest
    own = tl.where(own < 0, 0.0, own)
    middle = shift.to(tl.float64) + rest.to(tl.float64)
    return count.to(tl.float64), middle, own.to(tl.float64)


@triton.jit
def keep_sums(to, plane, there, total, product):
    """Write what a program found: its part of the two sums."""
    tl.store(to, total, mask=there)
    tl.store(to + plane, product, mask=there)


@triton.jit
def sums_of(total, product, mean, inverse_std, ACC: tl.constexpr):
    """Return sum g and sum g * xhat in float64, given sum g and sum g * (x - near)."""
    _, rest = split_mean(mean, ACC)
    total = total.to(tl.float64)
    return total, (product.to(tl.float64) - rest * total) * inverse_std


@triton.jit
def give_sums(a, b, at, channel, here, sum_g, sum_g_xhat, dweight, dbias):
    """Write sum g and sum g * xhat, and as gradients where those are asked for."""
    tl.store(sum_g + at, a, here)
    tl.store(sum_g_xhat + at, b, here)
    if dweight is not None:
        tl.store(dweight + channel, b.to(dweight.dtype.element_ty), here)
    if dbias is not None:
        tl.store(dbias + channel, a.to(dbias.dtype.element_ty), here)
