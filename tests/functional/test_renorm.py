"""Batch renormalization held to the NumPy reference: r and d are constants to every derivative."""

import numpy as np
import pytest
import torch
from support import (
    ACTIVATIONS,
    BACKENDS,
    FLOATS,
    LAYOUTS,
    as_numpy,
    assert_close,
    assert_steps_close,
    expected_running,
    expected_step,
    make,
    step,
    weights_of,
)
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import reference
from batchnorm.functional import Renorm

#: What is corrected towards: some channels within the limits below, some beyond, either way.
RUNNING = torch.tensor([0.0, 2.0, 0.5, -1.0, 0.9]), torch.tensor([4.0, 1.0, 9.0, 4.1, 3.9])
LIMITS = [(1, 0), (1.2, 0.1), (3, 5), (1e3, 1e3)]


def running():
    return tuple(v.clone() for v in RUNNING)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_backward_and_statistics_equal_the_reference(dtype, layout, backend, masked):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    inputs = make(shape, channel_dim, memory_format, dtype)
    mask = weights_of(shape, channel_dim) if masked else None
    for limits in LIMITS:
        state, count = running(), torch.tensor(3)

        def function(x, weight, bias, residual, limits=limits, state=state, count=count):
            return bn.batch_norm(
                x, *state, weight, bias, True, residual=residual, mask=mask, activation="silu",
                channel_dim=channel_dim, num_batches_tracked=count, renorm=limits,
            )  # fmt: skip

        with bn.backend(backend):
            found = step(function, *inputs)
        options = {"axis": channel_dim, "weights": mask, "renorm": limits}
        options["running"] = [as_numpy(v) for v in RUNNING]
        assert_steps_close(found, expected_step(*inputs, "silu", **options), dtype)
        assert found[0].stride() == inputs[0].stride()
        assert count == 4
        after = expected_running(RUNNING, inputs[0], axis=channel_dim, weights=mask)
        for mine, truth in zip(state, after, strict=True):
            assert_close(mine, truth, torch.float32, "sum")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ghost_size", [None, 3])
def test_every_activation_with_correction_and_groups(activation, backend, ghost_size):
    inputs = make((7, 5, 6), 1, torch.contiguous_format, torch.float64)

    def function(x, weight, bias, residual):
        return bn.batch_norm(
            x, *running(), weight, bias, True, residual=residual, activation=activation,
            correction=1, renorm=(1.2, 0.1), ghost_size=ghost_size,
        )  # fmt: skip

    with bn.backend(backend):
        found = step(function, *inputs)
    expected = expected_step(
        *inputs, activation, correction=1, renorm=(1.2, 0.1), ghost_size=ghost_size,
        running=[as_numpy(v) for v in RUNNING],
    )  # fmt: skip
    assert_steps_close(found, expected, torch.float64)


def test_within_the_limits_y_is_that_of_inference_and_the_gradient_that_of_training():
    inputs = make((9, 5), 1, torch.contiguous_format, torch.float64)

    def function(x, weight, bias, residual):
        return bn.batch_norm(
            x, *running(), weight, bias, True, residual=residual, renorm=(1e3, 1e3)
        )

    y, dx, *_ = step(function, *inputs)
    x, weight, bias, residual, _ = inputs
    torch.testing.assert_close(
        y, F.batch_norm(x, *(v.double() for v in RUNNING), weight, bias) + residual
    )
    torch.testing.assert_close(dx.sum(0), torch.zeros(5).double())


def test_without_room_it_is_batch_normalization():
    x = torch.randn(9, 5)
    y = bn.batch_norm(x, *running(), training=True, renorm=(1, 0))
    torch.testing.assert_close(y, bn.batch_norm(x, training=True))


def test_inference_is_not_corrected():
    x = torch.randn(9, 5)
    assert torch.equal(bn.batch_norm(x, *RUNNING, renorm=(3, 5)), bn.batch_norm(x, *RUNNING))


def test_it_needs_running_statistics():
    with pytest.raises(ValueError, match="there are none"):
        bn.batch_norm(torch.randn(9, 5), training=True, renorm=(3, 5))
    assert bn.batch_norm(torch.randn(9, 5), *RUNNING, renorm=(3, 5)).shape == (9, 5)


def by_hand(x, weight, bias, state, limits, eps):
    """Return renormalization as batch normalization with another scale and another shift."""
    mean, std = x.detach().mean(0), (x.detach().var(0, correction=0) + eps).sqrt()
    to = (state[1] + eps).sqrt()
    r = (std / to).clamp(1 / limits[0], limits[0])
    d = ((mean - state[0]) / to).clamp(-limits[1], limits[1])
    return bn.batch_norm(x, weight=weight * r, bias=bias + weight * d, training=True, eps=eps)


class TestDerivatives:
    """Finite differences see r and d move, but for where both are clipped."""

    def clipped(self):
        x = torch.randn(7, 2, 2, dtype=torch.float64)
        state = torch.tensor([9.0, -9.0]).double(), torch.tensor([50.0, 0.01]).double()
        return x, torch.randn(2).double(), torch.randn(2).double(), state

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("ghost_size", [None, 4])
    def test_of_first_and_second_order_beyond_the_limits(self, masked, ghost_size):
        *inputs, state = self.clipped()
        mask = weights_of((7, 2, 2), 1) if masked else None

        def function(x, weight, bias):
            return bn.batch_norm(
                x, *(v.clone() for v in state), weight, bias, True, eps=0.1, mask=mask,
                activation="gelu", renorm=(1.5, 0.3), ghost_size=ghost_size,
            )  # fmt: skip

        for value in inputs:
            value.requires_grad_()
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(function, inputs)

    def inputs_within(self):
        x, weight, bias, _, dy = make((9, 5), 1, torch.contiguous_format, torch.float64)
        return [v.requires_grad_() for v in (x, weight, bias)], dy, torch.randn(9, 5).double()

    @pytest.mark.parametrize("limits", LIMITS)
    def test_of_second_order_within_the_limits(self, limits):
        inputs, dy, v = self.inputs_within()
        state = tuple(v.double() for v in RUNNING)
        found = []
        for function in (
            lambda *a: bn.batch_norm(
                a[0], *(v.clone() for v in state), *a[1:], True, eps=0.1, renorm=limits
            ),
            lambda *a: by_hand(*a, state, limits, 0.1),
        ):
            y = function(*inputs)
            first = torch.autograd.grad(y, inputs, dy, create_graph=True)
            found.append([y, *first, *torch.autograd.grad(first[0], inputs[:2], v)])
        for mine, truth in zip(*found, strict=True):
            torch.testing.assert_close(mine, truth)

    @pytest.mark.parametrize("limits", LIMITS)
    def test_in_forward_mode_and_by_torch_func(self, limits):
        inputs, dy, tangent = self.inputs_within()
        x, weight, bias = (v.detach() for v in inputs)
        state = tuple(v.double() for v in RUNNING)

        def ours(x):
            return bn.batch_norm(
                x, bn.State(*state), weight=weight, bias=bias, training=True, eps=0.1, renorm=limits
            )[0]

        def truth(x):
            return by_hand(x, weight, bias, state, limits, 0.1)

        expected = torch.autograd.grad(truth(inputs[0]), inputs[0], dy)[0]
        torch.testing.assert_close(torch.func.vjp(ours, x)[1](dy)[0], expected)
        change = torch.func.jvp(ours, (x,), (tangent,))[1]
        torch.testing.assert_close((change * dy).sum(), (expected * tangent).sum())

    def test_nothing_flows_to_the_running_statistics(self):
        state = [v.double().requires_grad_() for v in RUNNING]
        x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
        y, after = bn.batch_norm(x, bn.State(*state), training=True, renorm=(1e3, 1e3))
        grads = torch.autograd.grad(y, [x, *state], torch.randn(9, 5), allow_unused=True)
        assert [g is None for g in grads] == [False, True, True]
        assert after.running_mean.requires_grad  # which follows the one before
        tangents = tuple(torch.ones_like(v) for v in state)

        def function(mean, var):
            return bn.batch_norm(x, bn.State(mean, var), training=True, renorm=(1e3, 1e3))[0]

        assert not torch.func.jvp(function, tuple(v.detach() for v in state), tangents)[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_may_be_tensors(backend):
    x, tensors = torch.randn(9, 5), (torch.tensor(1.2), torch.tensor(0.1))
    mean, std = x.double().mean(0), (x.double().var(0, correction=0) + 1e-5).sqrt()
    found, expected = (
        Renorm(*RUNNING, *limits, 1e-5).correction(mean, 1 / std)
        for limits in (tensors, (1.2, 0.1))
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_values_and_constant_channels(backend):
    state, bias = running(), torch.randn(5)
    with bn.backend(backend):
        for shape, mask in (((0, 5), None), ((4, 5), torch.zeros(4))):
            x = torch.randn(shape, requires_grad=True)
            y = bn.batch_norm(
                x, *state, bias=bias, training=True, mask=mask, renorm=(3, 5), ghost_size=2
            )
            y.backward(torch.randn(shape))
            assert torch.equal(y, bias.expand(shape))
            assert not x.grad.any()
        assert all(map(torch.equal, state, RUNNING))
        x = torch.full((4, 5), 3.0)
        y = bn.batch_norm(x, *state, training=True, renorm=(3, 5))
    options = {"running": [as_numpy(v) for v in RUNNING], "renorm": (3, 5)}
    assert_close(y, reference.forward(as_numpy(x), **options), torch.float32)


def test_a_batch_that_is_not_finite_moves_nothing():
    x, state = torch.randn(9, 5), running()
    x[2, 1] = np.inf
    y = bn.batch_norm(x, *state, training=True, renorm=(3, 5))
    assert y[:, 1].isnan().any()
    assert y[:, 0].isfinite().all()
    assert all(map(torch.equal, state, RUNNING))


def test_a_full_graph_gives_the_same():
    torch._dynamo.reset()
    inputs = make((7, 5, 4), 1, torch.contiguous_format, torch.float32)
    mask, found = weights_of((7, 5, 4), 1), []
    for call in (bn.batch_norm, torch.compile(bn.batch_norm, fullgraph=True, backend="aot_eager")):
        state = running()

        def function(x, weight, bias, residual, call=call, state=state):
            return call(
                x, *state, weight, bias, True, residual=residual, mask=mask, activation="relu",
                renorm=(1.2, 0.1), ghost_size=3,
            )  # fmt: skip

        found.append([*step(function, *inputs), *state])
    for truth, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth)
