"""`batch_norm` held to the NumPy reference and to `torch.nn.functional.batch_norm`."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    HALVES,
    LAYOUTS,
    activate,
    as_numpy,
    assert_close,
    make,
    named,
    parameter_dtype,
)
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import reference


def step(x, weight, bias, residual, dy, **options):
    """Return y and the gradients of all inputs by our function."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    y = bn.batch_norm(x, weight=weight, bias=bias, residual=residual, **options)
    y.backward(dy)
    return y, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_backward_equal_the_reference(dtype, layout, activation, masked):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    x, weight, bias, residual, dy = make(shape, channel_dim, memory_format, dtype)
    positions = list(shape)
    del positions[channel_dim]
    mask = torch.randint(0, 3, positions) if masked else None
    options = {"axis": channel_dim, "weights": mask, "residual": as_numpy(residual)}
    args = [as_numpy(v) for v in (x, weight, bias)]
    expected = reference.forward(*args, **options, **named(activation))
    gradients = reference.backward(as_numpy(dy), *args, **options, **named(activation))
    y, dx, dweight, dbias, dresidual = step(
        x,
        weight,
        bias,
        residual,
        dy,
        training=True,
        activation=activation,
        channel_dim=channel_dim,
        mask=mask,
    )
    wide = parameter_dtype(dtype)
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, wide)
    assert y.stride() == x.stride()
    assert_close(y, expected, dtype)
    assert_close(dx, gradients.x, dtype)
    assert_close(dresidual, gradients.residual, dtype)
    assert_close(dweight, gradients.gamma, wide, "sum", scale=10)
    assert_close(dbias, gradients.beta, wide, "sum", scale=10)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_running_statistics_normalize_as_in_the_reference(dtype, activation):
    x, weight, bias, residual, dy = make((4, 5, 6, 7), 1, torch.contiguous_format, dtype)
    running = (torch.randn(5), torch.rand(5) + 0.5)
    args = [as_numpy(v) for v in (x, weight, bias)]
    options = {"residual": as_numpy(residual), "running": [as_numpy(r) for r in running]}
    y, dx, dweight, dbias, dresidual = step(
        x, weight, bias, residual, dy, running_mean=running[0], running_var=running[1],
        activation=activation,
    )  # fmt: skip
    gradients = reference.backward(as_numpy(dy), *args, **options, **named(activation))
    assert_close(y, reference.forward(*args, **options, **named(activation)), dtype)
    assert_close(dx, gradients.x, dtype)
    assert_close(dresidual, gradients.residual, dtype)
    assert_close(dweight, gradients.gamma, parameter_dtype(dtype), "sum", scale=10)
    assert_close(dbias, gradients.beta, parameter_dtype(dtype), "sum", scale=10)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_correction_equals_the_reference(correction, masked):
    x, weight, bias, residual, dy = make((7, 3), 1, torch.contiguous_format, torch.float64)
    mask = torch.tensor([1, 0, 2, 1, 1, 0, 1]) if masked else None
    options = {"correction": correction, "weights": mask, "residual": as_numpy(residual)}
    args = [as_numpy(v) for v in (x, weight, bias)]
    y, dx, *_ = step(x, weight, bias, residual, dy, training=True, correction=correction, mask=mask)
    assert_close(y, reference.forward(*args, **options), torch.float64)
    assert_close(dx, reference.backward(as_numpy(dy), *args, **options).x, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["NC", "NCL", "NCHW", "NHWC", "NCDHW", "NDHWC"])
def test_equals_torch_with_its_positional_arguments(dtype, training, layout):
    shape, _, memory_format = LAYOUTS[layout]
    x, weight, bias, _, dy = make(shape, 1, memory_format, dtype)
    results = []
    for function in (F.batch_norm, bn.batch_norm):
        wide = parameter_dtype(dtype)
        running = torch.ones(5, dtype=wide), torch.full((5,), 2.0, dtype=wide)
        leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias)]
        y = function(leaves[0], *running, *leaves[1:], training, 0.3, 1e-3)
        y.backward(dy)
        results.append([y, *(leaf.grad for leaf in leaves), *running])
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, dtype, "sum", scale=4)


@pytest.mark.parametrize("mean", [0.0, 1e1, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_float32_keeps_its_digits_at_every_mean(mean, layout):
    memory_format = LAYOUTS[layout][2]
    x, weight, bias, residual, dy = make((8, 5, 30, 30), 1, memory_format, torch.float32, mean)
    args = [as_numpy(v) for v in (x, weight, bias)]
    y, dx, *_ = step(x, weight, bias, residual, dy, training=True)
    options = {"residual": as_numpy(residual)}
    assert_close(y, reference.forward(*args, **options), torch.float32)
    assert_close(dx, reference.backward(as_numpy(dy), *args, **options).x, torch.float32)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_drawn_shapes_equal_the_reference(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5), label="shape"))
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1), label="channel_dim")
    order = data.draw(st.permutations(range(len(shape))), label="memory order")
    x = torch.randn([shape[d] for d in order], dtype=torch.float64).permute(
        [order.index(d) for d in range(len(shape))]
    )
    x = x * 10 ** data.draw(st.integers(-3, 3)) + data.draw(st.integers(-1000, 1000))
    dy = torch.randn(shape, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = bn.batch_norm(leaf, training=True, channel_dim=channel_dim, on_small_batch="skip")
    y.backward(dy)
    expected = reference.forward(x.numpy(), axis=channel_dim)
    gradient = reference.backward(dy.numpy(), x.numpy(), axis=channel_dim).x
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-9, atol=1e-9)
    scale = max(1.0, np.abs(gradient).max())
    np.testing.assert_allclose(leaf.grad, gradient, rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_first_and_second_order(activation, masked, training):
    shape = (4, 3, 2)
    inputs = [torch.randn(s, dtype=torch.float64) for s in (shape, 3, 3, shape)]
    if activation in ("relu", ("leaky_relu", 0.2), ("elu", 0.7), "relu6", "hardswish"):
        # finite differences must not step over a kink: all are at multiples of 3
        inputs[3] = 3 * torch.randint(-2, 3, shape).double() + 1.5
        inputs[2] *= 0.01
        inputs[1] *= 0.01
    mask = torch.randint(0, 3, (4, 2)) if masked else None
    running = (torch.randn(3), torch.rand(3) + 0.5)

    def function(x, weight, bias, residual):
        return bn.batch_norm(
            x, *(() if training else running), weight=weight, bias=bias, residual=residual,
            training=training, activation=activation, mask=mask, eps=0.1,
        )  # fmt: skip

    for value in inputs:
        value.requires_grad_()
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_third_derivative_is_right_too():
    x, v = (torch.randn(5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def second(x, v):
        y = bn.batch_norm(x, training=True, activation="tanh", eps=0.1)
        (first,) = torch.autograd.grad(y, x, v, create_graph=True)
        (result,) = torch.autograd.grad((first * v).sum(), x, create_graph=True)
        return result

    assert torch.autograd.gradcheck(second, (x, v))


@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=4)])
def test_only_the_gradients_that_are_asked_for(needed):
    values = [torch.randn(s) for s in ((6, 3), 3, 3, (6, 3))]
    dy = torch.randn(6, 3)
    everything = step(*values, dy, training=True, activation="gelu")[1:]
    for value, need in zip(values, needed, strict=True):
        value.requires_grad_(need)
    y = bn.batch_norm(
        values[0], weight=values[1], bias=values[2], residual=values[3], training=True,
        activation="gelu",
    )  # fmt: skip
    assert y.requires_grad == any(needed)
    if any(needed):
        y.backward(dy)
    for value, need, expected in zip(values, needed, everything, strict=True):
        assert (value.grad is not None) == need
        if need:
            torch.testing.assert_close(value.grad, expected)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("mask", [None, torch.ones(8, 10, 10)])
def test_what_is_kept_for_the_backward_pass_is_x_and_two_numbers_a_channel(mask, activation):
    kept = []
    x = torch.randn(8, 3, 10, 10, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    residual = torch.randn(8, 3, 10, 10, requires_grad=True)

    def pack(tensor):
        kept.append(tensor)
        return tensor

    running = torch.zeros(3), torch.ones(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = bn.batch_norm(
            x, *running, weight, bias, True, residual=residual, mask=mask, activation=activation
        )
    inputs = [x, weight, bias]
    if activation is not None:  # its derivative is computed from the residual, too
        inputs.append(residual)
    own, rest = kept[: len(inputs)], kept[len(inputs) :]
    assert [v.data_ptr() for v in own] == [v.data_ptr() for v in inputs]
    assert [v.numel() for v in rest] == ([] if mask is None else [mask.numel()])
    call = y.grad_fn.call
    others = [v for name in call.__slots__ if isinstance(v := getattr(call, name), torch.Tensor)]
    assert all(v.numel() == 1 for v in others)  # a count
    assert [v.numel() for v in call.statistics()] == [3, 3]


@pytest.mark.parametrize("given", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_the_gradient_that_torch_gives_it(given):
    running = torch.zeros(3), torch.ones(3)
    x, dy = torch.randn(6, 3), torch.randn(6, 3)
    x[2, 1] = given
    found = []
    for layer in (bn.batch_norm, lambda *a, activation: F.relu(F.batch_norm(*a))):
        values = [v.clone().requires_grad_() for v in (x, torch.ones(3), torch.zeros(3))]
        y = layer(values[0], *running, *values[1:], activation="relu")
        found.append([y, *torch.autograd.grad(y, values, dy)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_numbers_of_the_channels_may_be_of_any_type():
    x, weight = torch.randn(6, 3), torch.tensor([1, 2, 3])
    y = bn.batch_norm(x, torch.tensor([1, 0, 2]), torch.tensor([1, 4, 9]), weight)
    expected = F.batch_norm(x, torch.tensor([1.0, 0, 2]), torch.tensor([1.0, 4, 9]), weight.float())
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("lay_out", [
    lambda v: v.unfold(0, 7, 1).T.unsqueeze(1),
    lambda v: v.view(1, 1, -1).expand(2, 3, -1).unfold(2, 7, 1).transpose(2, 3),
    lambda v: v.as_strided((4, 1, 7), (1, 1, 1)),
    lambda v: v[:, None].expand(-1, 4),
])  # fmt: skip
def test_values_that_share_memory(lay_out):
    x = lay_out(torch.randn(20))
    y = bn.batch_norm(x, training=True)
    torch.testing.assert_close(y, bn.batch_norm(x.contiguous(), training=True))


class TestMask:
    def test_may_not_change_before_the_backward_pass(self):
        x, mask = torch.randn(6, 3, requires_grad=True), torch.ones(6)
        y = bn.batch_norm(x, training=True, mask=mask, activation="relu")
        mask.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_takes_any_shape_that_broadcasts_over_the_positions(self):
        x = torch.randn(4, 3, 5, 6)
        rows = torch.tensor([True, False, True, True])
        full = bn.batch_norm(x, training=True, mask=rows[:, None, None].expand(4, 5, 6))
        for mask in (rows[:, None, None], rows[:, None, None, None], rows[:, None, None].float()):
            torch.testing.assert_close(bn.batch_norm(x, training=True, mask=mask), full)
        columns = torch.arange(6) < 4
        torch.testing.assert_close(
            bn.batch_norm(x, training=True, mask=columns),
            bn.batch_norm(x, training=True, mask=columns.expand(4, 5, 6)),
        )

    def test_the_valid_positions_alone_make_the_moments(self):
        x = torch.randn(4, 3, 10) + 5
        lengths = torch.tensor([10, 3, 7, 1])
        mask = torch.arange(10) < lengths[:, None]
        running = torch.zeros(3), torch.ones(3)
        y = bn.batch_norm(x, *running, training=True, momentum=1.0, mask=mask)
        valid = x.transpose(1, 2)[mask]
        torch.testing.assert_close(running[0], valid.mean(0))
        torch.testing.assert_close(running[1], valid.var(0))
        normalized = y.transpose(1, 2)[mask]
        torch.testing.assert_close(normalized, bn.batch_norm(valid, training=True))

    def test_nan_in_the_padding_reaches_nothing(self):
        x = torch.randn(4, 3, 10)
        mask = torch.arange(10) < torch.tensor([10, 3, 7, 1])[:, None]
        poisoned = x.transpose(1, 2).masked_fill(~mask[..., None], torch.nan).transpose(1, 2)
        dy = torch.randn(4, 3, 10)
        weight, bias = torch.randn(3), torch.randn(3)
        y, dx, dweight, dbias, _ = step(
            poisoned, weight, bias, torch.zeros_like(x), dy, training=True, mask=mask
        )
        clean, *_ = step(x, weight, bias, torch.zeros_like(x), dy, training=True, mask=mask)
        valid = mask[:, None].expand_as(x)
        torch.testing.assert_close(y[valid], clean[valid])
        for result in (y, dx, dweight, dbias):
            assert result.isfinite().all()
        assert not dx[~valid].any()

    def test_nothing_valid_updates_nothing_and_has_no_gradient(self):
        x = torch.randn(4, 3, requires_grad=True)
        running = torch.ones(3), torch.ones(3)
        bias = torch.randn(3)
        y = bn.batch_norm(x, *running, bias=bias, training=True, mask=torch.zeros(4))
        y.backward(torch.randn(4, 3))
        assert torch.equal(y, bias.expand(4, 3))
        assert not x.grad.any()
        assert [r.tolist() for r in running] == [[1, 1, 1]] * 2

    def test_one_of_a_wrong_size_says_what_was_expected(self):
        with pytest.raises(ValueError, match=r"mask is of size \(3,\): .* positions, \(4, 5\)"):
            bn.batch_norm(torch.zeros(4, 2, 5), training=True, mask=torch.ones(3))
        with pytest.raises(ValueError, match="mask is of size"):
            bn.batch_norm(torch.zeros(4, 2, 5), training=True, mask=torch.ones(4, 2, 5))


class TestRunningStatistics:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_batch_that_is_not_finite_never_changes_them(self, bad):
        running = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        before = copy.deepcopy(running)
        x = torch.randn(5, 2)
        x[3, 1] = bad
        count = torch.tensor(7)
        y = bn.batch_norm(x, *running, training=True, num_batches_tracked=count)
        assert y[:, 1].isnan().any()  # what is computed is not hidden
        assert all(map(torch.equal, running, before))
        assert count == 7

    @pytest.mark.parametrize("shape", [(0, 2), (0, 2, 3), (3, 2, 0)])
    def test_an_empty_batch_has_zero_gradients_and_changes_nothing(self, shape):
        running = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        before, count = copy.deepcopy(running), torch.tensor(7)
        x = torch.zeros(shape, requires_grad=True)
        weight, bias = (torch.ones(2, requires_grad=True) for _ in range(2))
        y = bn.batch_norm(
            x, *running, weight, bias, training=True, num_batches_tracked=count, activation="relu"
        )
        y.backward(torch.zeros(shape))
        assert y.shape == x.grad.shape == shape
        assert weight.grad.tolist() == bias.grad.tolist() == [0, 0]
        assert all(map(torch.equal, running, before))
        assert count == 7

    def test_momentum_none_is_the_average_of_all_batches(self):
        running, count = (torch.zeros(3), torch.ones(3)), torch.tensor(0)
        batches = torch.randn(10, 20, 3)
        for batch in batches:
            bn.batch_norm(batch, *running, training=True, momentum=None, num_batches_tracked=count)
        torch.testing.assert_close(running[0], batches.mean(dim=(0, 1)))
        torch.testing.assert_close(running[1], batches.var(dim=1).mean(dim=0))
        with pytest.raises(ValueError, match="pass num_batches_tracked"):
            bn.batch_norm(batches[0], *running, training=True, momentum=None)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_follow_half_batches_in_float32(self, dtype):
        running = torch.zeros(2), torch.ones(2)
        x = (torch.randn(4000, 2) + 3).to(dtype)
        bn.batch_norm(x, *running, training=True, momentum=1.0)
        torch.testing.assert_close(running[0], x.double().mean(0).float())
        torch.testing.assert_close(running[1], x.double().var(0).float())


class TestSmallBatch:
    def test_error_is_that_of_torch_with_the_way_out(self):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
            bn.batch_norm(torch.zeros(1, 3), training=True)
        with pytest.raises(ValueError, match="Expected more than 1") as theirs:
            F.batch_norm(torch.zeros(1, 3), None, None, training=True)
        assert str(ours.value).startswith(str(theirs.value))
        assert 'on_small_batch="running"' in str(ours.value)

    def test_running_normalizes_by_the_running_statistics(self):
        running = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        before, x = copy.deepcopy(running), torch.randn(1, 2)
        y = bn.batch_norm(x, *running, training=True, on_small_batch="running")
        torch.testing.assert_close(y, F.batch_norm(x, *before))
        assert all(map(torch.equal, running, before))

    def test_skip_gives_the_bias_and_no_gradient(self):
        running = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        before = copy.deepcopy(running)
        x, bias = torch.randn(1, 2, requires_grad=True), torch.randn(2)
        y = bn.batch_norm(x, *running, bias=bias, training=True, on_small_batch="skip")
        y.backward(torch.randn(1, 2))
        torch.testing.assert_close(y, bias[None])
        assert not x.grad.any()
        assert all(map(torch.equal, running, before))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_constant_channels_and_infinite_upstream_stay_where_torch_puts_them(activation):
    x = torch.randn(6, 3)
    x[:, 1] = 4
    ours = bn.batch_norm(x, training=True, activation=activation)
    theirs = activate(activation, F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(ours, theirs)
    x[2, 0] = torch.inf
    ours = bn.batch_norm(x, training=True, activation=activation)
    theirs = activate(activation, F.batch_norm(x, None, None, training=True))
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("special", [0.0, -3.0, 3.0, 6.0, torch.inf, -torch.inf, torch.nan])
def test_activation_and_gradient_at_special_values_are_those_of_torch(activation, special):
    inputs = [
        torch.full((2, 1), special, dtype=d).requires_grad_()
        for d in (torch.float32, torch.float64)
    ]
    running = [
        (torch.zeros(1, dtype=d), torch.ones(1, dtype=d)) for d in (torch.float32, torch.float64)
    ]
    ours = bn.batch_norm(inputs[0], *running[0], eps=0.0, activation=activation)
    # in float64, for on some processors torch's float32 gelu is NaN at infinity
    theirs = activate(activation, F.batch_norm(inputs[1], *running[1], eps=0.0))
    odd = activation == "gelu" and F.gelu(inputs[0]).isnan().any() and not theirs.isnan().any()
    if odd and bn.backends()[0].available() is not None:
        pytest.skip("eager uses that gelu")
    torch.testing.assert_close(ours.double(), theirs, equal_nan=True)
    if math.isfinite(special):
        for y in (ours, theirs):
            y.backward(torch.ones_like(y))
        torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad)


class TestTransforms:
    def test_vmap_normalizes_each_batch_by_itself(self):
        x, weight = torch.randn(7, 5, 3), torch.randn(7, 3)

        def function(x, weight):
            return bn.batch_norm(x, weight=weight, training=True, activation="silu")

        expected = torch.stack([function(*pair) for pair in zip(x, weight, strict=True)])
        torch.testing.assert_close(torch.func.vmap(function)(x, weight), expected)

    def test_vmap_updates_batched_running_statistics(self):
        x = torch.randn(7, 5, 3)
        ours = torch.zeros(7, 3), torch.ones(7, 3)

        def update(x, mean, var):
            return bn.batch_norm(x, mean, var, training=True)

        torch.func.vmap(update)(x, *ours)
        torch.testing.assert_close(ours[0], 0.1 * x.mean(1))
        torch.testing.assert_close(ours[1], 0.9 + 0.1 * x.var(1))

    def test_jacobian_and_hessian(self):
        x = torch.randn(4, 2, dtype=torch.float64)

        def loss(x):
            return bn.batch_norm(x, training=True, activation="tanh", eps=0.1).pow(3).sum()

        expected = torch.autograd.functional.hessian(loss, x)
        torch.testing.assert_close(torch.func.hessian(loss)(x), expected)
        torch.testing.assert_close(torch.func.jacfwd(torch.func.grad(loss))(x), expected)

    def test_per_sample_gradients_in_evaluation(self):
        x, running = torch.randn(6, 3), (torch.randn(3), torch.rand(3) + 0.5)

        def loss(weight, x):
            return bn.batch_norm(x[None], *running, weight=weight).square().sum()

        weight = torch.randn(3)
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
        expected = [torch.func.grad(loss)(weight, example) for example in x]
        torch.testing.assert_close(per_sample, torch.stack(expected))


class TestWhatABadBatchLeaves:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("bad", ["nan", "inf", "masked", "too large"])
    def test_a_first_batch_that_is_bad_spoils_no_average(self, bad, compiled):
        torch._dynamo.reset()
        running, count = (torch.zeros(2), torch.ones(2)), torch.tensor(0)
        x, mask = torch.randn(6, 2), torch.ones(6)
        wrong = {"nan": x * torch.nan, "inf": x / 0, "masked": x, "too large": x.double() * 1e30}
        function = bn.batch_norm
        if compiled:
            function = torch.compile(function, backend="aot_eager")
        options = {"training": True, "momentum": None, "num_batches_tracked": count}
        function(wrong[bad], *running, mask=mask * 0 if bad == "masked" else mask, **options)
        assert [r.tolist() for r in running] == [[0, 0], [1, 1]]
        assert count == 0
        function(x, *running, mask=mask, **options)
        torch.testing.assert_close(running, (x.mean(0), x.var(0)))
        assert count == 1


@pytest.mark.parametrize("padding", [-1e30, 1e20, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_large_padding_reaches_nothing(padding, layout):
    shape, _, memory_format = LAYOUTS[layout]
    x, weight, bias, residual, dy = make(shape, 1, memory_format, torch.float32)
    mask = torch.ones(shape[0], *[1] * (len(shape) - 2))
    mask[-2:] = 0
    dy[-2:] = 0
    expected = step(x, weight, bias, residual, dy, training=True, mask=mask, activation="gelu")
    padded = x.clone()
    padded[-2:] = padding
    found = step(padded, weight, bias, residual, dy, training=True, mask=mask, activation="gelu")
    for actual, wanted in zip(found, expected, strict=True):
        if actual.shape == shape:
            actual, wanted = actual[:-2], wanted[:-2]
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_numbers_of_the_channels_may_have_any_shape():
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(1, 3, 1, 1)
    running, expected = (torch.zeros(3, 1), torch.ones(3, 1)), (torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(
        bn.batch_norm(x, *running, weight=weight, training=True),
        F.batch_norm(x, *expected, weight=weight, training=True),
    )
    for ours, theirs in zip(running, expected, strict=True):
        torch.testing.assert_close(ours.ravel(), theirs)
