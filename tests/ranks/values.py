"""Checks of the numbers: several processes against one with the whole batch."""

import numpy as np
import torch
import torch.distributed as dist
from ranks.batches import (
    alone,
    assert_like_one,
    assert_named,
    assert_same_everywhere,
    layer_of,
    part,
    step,
)
from ranks.processes import check
from support import ACTIVATIONS, FLOATS, HALVES, LAYOUTS, make

import batchnorm as bn
from batchnorm import reference

#: How many examples each rank has, by the number of ranks.
SHARES = {
    1: [(6,)],
    2: [(5, 1), (0, 6), (7, 0), (1, 1), (4, 4)],
    3: [(4, 0, 3), (1, 1, 1), (0, 0, 5), (2, 9, 1)],
    4: [(1, 2, 3, 4), (0, 0, 0, 3), (2, 0, 0, 1), (0, 5, 5, 0)],
}


def random(*shape, dtype=torch.float64, mean=0.0):
    """Return values that are the same on every rank."""
    return (torch.randn(shape, dtype=torch.float64) * 2 + mean).to(dtype)


@check(1, 2, 3, 4)
def shares_of_any_size_and_empty_ones(rank, size):
    for shares in SHARES[size]:
        for dtype in (torch.float64, torch.float32):
            for shape in ((sum(shares), 3), (sum(shares), 3, 4, 5)):
                x, dy = random(*shape, dtype=dtype, mean=0.7), random(*shape, dtype=dtype)
                assert_like_one(layer_of(3, dtype), rank, shares, x, dy)


@check(2, 3, 4)
def ten_times_as_many_on_each_next_rank(rank, size):
    shares = tuple(10 ** (i + 1) for i in range(size))
    x, dy = random(sum(shares), 3, mean=5.0), random(sum(shares), 3)
    x[:10] += 100  # the smallest share is unlike the others
    layer = layer_of(3, momentum=1.0)
    assert_like_one(layer, rank, shares, x, dy)
    np.testing.assert_allclose(layer.running_mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, x.var(0, correction=1), rtol=1e-12)


@check(2)
def the_worked_example_and_the_reference(rank, size):
    whole = torch.tensor([[3.0], [5], [8], [9], [11], [24]], dtype=torch.float64)
    layer = bn.SyncBatchNorm(1, dtype=torch.float64)
    y = layer(part(whole, (2, 4), rank))
    expected = torch.tensor([[-1.03], [-0.74], [-0.29], [-0.15], [0.15], [2.06]])
    assert torch.equal(y.detach().round(decimals=2).float(), part(expected, (2, 4), rank))

    x, dy, residual = (random(9, 3, 5) for _ in range(3))
    layer = layer_of(3, activation="silu", correction=1)
    options = {"activation": "silu", "correction": 1, "residual": residual.numpy()}
    arrays = [v.detach().numpy() for v in (x, layer.weight, layer.bias)]
    expected = {"y": reference.forward(*arrays, **options)}
    for name, values in reference.backward(dy.numpy(), *arrays, **options)._asdict().items():
        expected[{"gamma": "dweight", "beta": "dbias"}.get(name, f"d{name}")] = values
    found = step(layer, *(part(v, (7, 2), rank).requires_grad_() for v in (x, dy, residual)))
    for name, values in expected.items():
        if name in ("dweight", "dbias"):
            dist.all_reduce(found[name])
        else:
            values = part(torch.as_tensor(values), (7, 2), rank)
        assert_named(name, found[name], values, torch.float64)


@check(2)
def every_layout_and_type(rank, size):
    for shape, channel_dim, memory_format in LAYOUTS.values():
        dim = 1 if channel_dim == 0 else 0
        first = shape[dim] // 3
        shares = first, shape[dim] - first
        for dtype in FLOATS:
            x, _, _, _, dy = make(shape, channel_dim, memory_format, dtype)
            layer = layer_of(shape[channel_dim], dtype, channel_dim=channel_dim)
            assert_like_one(layer, rank, shares, x, dy, dim=dim)


@check(2)
def residual_and_activation(rank, size):
    shares = SHARES[size][0]
    for activation in ACTIVATIONS:
        for dtype in (torch.float64, torch.float32):
            x, dy, residual = (random(sum(shares), 5, 3, dtype=dtype) for _ in range(3))
            layer = layer_of(5, dtype, activation=activation)
            found = assert_like_one(layer, rank, shares, x, dy, residual, times=2)
            assert found["dresidual"].shape == (shares[rank], 5, 3)


@check(2, 3)
def masks_and_one_that_leaves_nothing(rank, size):
    shares = (4, 5) if size == 2 else (3, 2, 4)
    here = torch.rand(sum(shares), 6) < 0.6
    weights = torch.rand(sum(shares), 6, dtype=torch.float64) * here
    for mask in (here, weights, weights.float()):
        for nothing in range(-1, size):
            left = mask.clone()
            if nothing >= 0:
                left[sum(shares[:nothing]) :][: shares[nothing]] = 0
            x, dy = random(sum(shares), 3, 6), random(sum(shares), 3, 6)
            x.masked_fill_((left == 0)[:, None], torch.nan)
            dy = dy * (left != 0)[:, None]
            assert_like_one(layer_of(3), rank, shares, x, dy, mask=left)
        assert_like_one(layer_of(3), rank, shares, dy, dy, mask=torch.zeros_like(mask))


@check(2)
def half_types_and_half_parameters(rank, size):
    shares = (3, 6)
    for dtype in HALVES:
        x, dy, residual = (random(9, 4, 5, dtype=dtype) for _ in range(3))
        layer = layer_of(4, dtype, activation="relu")
        assert_like_one(layer, rank, shares, x, dy, residual)
        layer = layer.to(dtype)
        assert layer.running_var.dtype == torch.float32
        expected = layer.running_mean.clone()
        layer(part(x, shares, rank))
        assert not torch.equal(layer.running_mean, expected)
        assert_same_everywhere(layer)
    # a sum and a count that float16 has not
    x = random(80_000, 1, dtype=torch.float16, mean=60.0)
    layer = bn.SyncBatchNorm(1, momentum=1.0)
    layer(part(x, (70_000, 10_000), rank))
    np.testing.assert_allclose(layer.running_mean, x.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, x.double().var(0), rtol=1e-6)


@check(2, 3)
def double_backward(rank, size):
    shares = (3, 6) if size == 2 else (3, 0, 6)
    settings = [
        {}, {"activation": "silu"}, {"affine": False}, {"correction": 1}, {"mask": True}
    ]  # fmt: skip
    for chosen in settings:
        mask = torch.rand(9, 4) if chosen.pop("mask", False) else None
        x, dy, v, residual = (random(9, 3, 4) for _ in range(4))
        layer = layer_of(3, **chosen)
        expected = twice(alone(layer), x, dy, v, residual, mask)
        own = [part(values, shares, rank) for values in (x, dy, v, residual)]
        found = twice(layer, *own, None if mask is None else part(mask, shares, rank))
        for i, values in enumerate(expected):
            if values is None:  # of a residual without an activation
                assert found[i] is None
                continue
            if i < 3:  # of x, dy and the residual
                values = part(values, shares, rank)
            else:
                dist.all_reduce(found[i])
            assert_named(f"{chosen}, {i}", found[i], values, torch.float64, times=4)


def twice(layer, x, dy, v, residual, mask):
    """Return what the gradients of (all first gradients times something) are."""
    x, dy, residual = (values.clone().requires_grad_() for values in (x, dy, residual))
    inputs = [x, residual, *layer.parameters()]
    first = torch.autograd.grad(layer(x, residual, mask), inputs, dy, create_graph=True)
    scalar = (first[0] * v).sum() + first[1].square().sum()
    scalar = scalar + sum((g * (i + 1)).sum() for i, g in enumerate(first[2:]))
    return list(
        torch.autograd.grad(scalar, [x, dy, residual, *layer.parameters()], allow_unused=True)
    )


@check(2, 4)
def a_mean_far_from_zero(rank, size):
    shares = SHARES[size][0]
    for dtype in (torch.float64, torch.float32):
        for far in (1e4, -1e6):
            x, dy = (
                random(sum(shares), 3, 50, dtype=dtype, mean=far),
                random(sum(shares), 3, 50, dtype=dtype),
            )
            # float64 itself has so many digits less at that mean
            times = max(1, abs(far) / 1e4) if dtype == torch.float64 else 1
            assert_like_one(layer_of(3, dtype), rank, shares, x, dy, times=times)
    # and each rank has its own
    x, dy = random(sum(shares), 3), random(sum(shares), 3)
    for other, count in enumerate(shares):
        x[sum(shares[:other]) :][:count] += 1e4 * other
    assert_like_one(layer_of(3), rank, shares, x, dy)


@check(2)
def every_setting(rank, size):
    shares, x, dy = (3, 6), random(9, 3, 4), random(9, 3, 4)
    for settings in (
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"eps": 0.1, "momentum": 0.5},
        {"correction": 1},
        {"on_small_batch": "skip"},
    ):
        layer = layer_of(3, **settings)
        for _ in range(3):
            assert_like_one(layer, rank, shares, x, dy)


@check(2)
def both_backends(rank, size):
    shares, x, dy, residual = (3, 6), random(9, 3, 4), random(9, 3, 4), random(9, 3, 4)
    for backend in bn.backends():
        if backend.available() is None:
            with bn.backend(backend.name):
                layer = layer_of(3, activation="gelu")
                assert_like_one(layer, rank, shares, x, dy, residual)


@check(2)
def in_place_and_without_a_gradient(rank, size):
    shares, x = (3, 6), random(9, 3, 4)
    layer = layer_of(3, activation="relu", inplace=True)
    whole = alone(layer)
    with torch.no_grad():
        expected = whole(x.clone())
        own = part(x, shares, rank)
        assert layer(own) is own
    assert_named("y", own, part(expected, shares, rank), torch.float64)


@check(2)
def transforms_of_torch_func(rank, size):
    """The loss is the sum of what each rank has of it, as in a backward pass."""
    x, dy, v, weight = random(9, 3, 4), random(9, 3, 4), random(9, 3, 4), random(3)
    expected = derivatives(x, dy, v, weight, None)
    found = derivatives(*(part(values, (3, 6), rank) for values in (x, dy, v)), weight, "world")
    for name, values in expected.items():
        if "x" in name:
            values = part(values, (3, 6), rank)
        else:
            dist.all_reduce(found[name])
        assert_named(name, found[name], values, torch.float64, times=4)


def derivatives(x, dy, v, weight, group):
    """Return the gradients of a loss, and those of its gradient by x times something."""

    def loss(x, weight):
        y = bn.batch_norm(x, weight=weight, training=True, activation="silu", process_group=group)
        return (y * dy).sum()

    def slope(x, weight):
        return (torch.func.grad(loss)(x, weight) * v).sum()

    first = torch.func.grad(loss, (0, 1))(x, weight)
    second = torch.func.grad(slope, (0, 1))(x, weight)
    return dict(zip(("dx", "dweight", "d2x", "d2weight"), (*first, *second), strict=True))
