"""Ghost batches: each group normalized as if it were a batch, held to the NumPy reference."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
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
    ghost_sizes,
    make,
    step,
    weights_of,
)
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import reference
from batchnorm.kernels import plain


def taken(layout, backend):
    """Return the sizes of groups to try; kernels want the examples outermost in memory."""
    kernels = backend in ("native", "triton")
    return () if kernels and layout == "channels in front" else ghost_sizes(layout)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_backward_and_statistics_equal_the_reference(dtype, layout, backend, masked):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    inputs = make(shape, channel_dim, memory_format, dtype)
    mask = weights_of(shape, channel_dim) if masked else None
    eps = 0.1 if masked else 1e-5  # a mask may leave a group one value, and rounding all the rest
    for size in taken(layout, backend):
        running, count = (torch.zeros(5), torch.ones(5)), torch.tensor(3)
        before = [v.clone() for v in running]

        def function(x, weight, bias, residual, size=size, running=running, count=count):
            return bn.batch_norm(
                x, *running, weight, bias, True, residual=residual, mask=mask, activation="silu",
                channel_dim=channel_dim, num_batches_tracked=count, ghost_size=size, eps=eps,
            )  # fmt: skip

        with bn.backend(backend):
            found = step(function, *inputs)
        options = {"axis": channel_dim, "weights": mask, "ghost_size": size, "eps": eps}
        assert_steps_close(found, expected_step(*inputs, "silu", **options), dtype)
        assert found[0].stride() == inputs[0].stride()
        assert count == 4
        whole = expected_running(before, inputs[0], axis=channel_dim, weights=mask)
        for mine, truth in zip(running, whole, strict=True):
            assert_close(mine, truth, torch.float32, "sum")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation(activation, backend):
    inputs = make((7, 5, 6), 1, torch.contiguous_format, torch.float64)

    def function(x, weight, bias, residual):
        return bn.batch_norm(
            x, weight=weight, bias=bias, training=True, residual=residual, activation=activation,
            correction=1, ghost_size=3,
        )  # fmt: skip

    with bn.backend(backend):
        found = step(function, *inputs)
    expected = expected_step(*inputs, activation, correction=1, ghost_size=3)
    assert_steps_close(found, expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("places", [(), (2,)])
@pytest.mark.parametrize("masked", [False, True])
def test_any_number_of_examples(backend, places, masked):
    size = 4
    for examples in range(2 * size + 2):
        x, _, _, _, dy = make((examples, 3, *places), 1, torch.contiguous_format, torch.float64)
        mask = weights_of(x.shape, 1) if masked else None
        running = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        with bn.backend(backend):
            arguments = {"training": True, "ghost_size": size, "eps": 0.1, "mask": mask}
            if examples == 1 and not places:
                with pytest.raises(ValueError, match=r"more than 1 value .* in groups of 4"):
                    bn.batch_norm(leaf, *running, **arguments)
                continue
            y = bn.batch_norm(leaf, *running, **arguments)
            y.backward(dy)
        options = {"ghost_size": size, "eps": 0.1, "weights": mask}
        assert_close(y, reference.forward(as_numpy(x), **options), torch.float64)
        gradients = reference.backward(as_numpy(dy), as_numpy(x), **options)
        assert_close(leaf.grad, gradients.x, torch.float64)
        ones = np.ones(3), np.ones(3)
        for mine, truth in zip(running, expected_running(ones, x, weights=mask), strict=True):
            assert_close(mine, truth, torch.float64, "sum")


@settings(max_examples=80)
@given(data=st.data())
def test_drawn_shapes_and_strides_equal_the_reference(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4), label="shape"))
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1), label="channel_dim")
    size = data.draw(st.integers(1, 5), label="ghost_size")
    order = data.draw(st.permutations(range(len(shape))), label="memory order")
    every = data.draw(st.tuples(*[st.integers(1, 2) for _ in shape]), label="steps")
    x = torch.randn([shape[d] * every[d] for d in order], dtype=torch.float64)
    x = x.permute([order.index(d) for d in range(len(shape))])
    x = x[tuple(slice(None, None, step) for step in every)]
    mask = weights_of(shape, channel_dim) if data.draw(st.booleans(), label="masked") else None
    places = x.numel() // x.shape[channel_dim]
    lengths = reference.groups(shape, channel_dim, size)
    assume(min(lengths) * places // sum(lengths) > 1)
    dy, leaf = torch.randn(shape, dtype=torch.float64), x.detach().requires_grad_()
    y = bn.batch_norm(
        leaf, training=True, channel_dim=channel_dim, ghost_size=size, mask=mask, eps=0.1
    )
    y.backward(dy)
    options = {"axis": channel_dim, "ghost_size": size, "weights": mask, "eps": 0.1}
    assert_close(y, reference.forward(x.numpy(), **options), torch.float64)
    gradient = reference.backward(dy.numpy(), x.numpy(), **options).x
    assert_close(leaf.grad, gradient, torch.float64, "sum")


@pytest.mark.parametrize("choice", ["running", "skip"])
def test_groups_of_one_value_are_what_on_small_batch_says(choice):
    running, count = (torch.randn(3), torch.rand(3) + 0.5), torch.tensor(0)
    x, bias = torch.randn(4, 3), torch.randn(3)
    y = bn.batch_norm(
        x, *[v.clone() for v in running], bias=bias, training=True, ghost_size=1,
        num_batches_tracked=count if choice == "skip" else None, on_small_batch=choice,
    )  # fmt: skip
    expected = F.batch_norm(x, *running, bias=bias) if choice == "running" else bias.expand(4, 3)
    torch.testing.assert_close(y, expected)
    assert count == 0


def test_each_group_has_mean_0_and_variance_1_and_is_the_batch_norm_of_torch():
    x = torch.randn(10, 3, 8, dtype=torch.float64) * 3 + 100
    y = bn.batch_norm(x, training=True, ghost_size=4)
    for group, values in zip(y.split(4), x.split(4), strict=True):
        torch.testing.assert_close(group.mean((0, 2)), torch.zeros(3).double())
        torch.testing.assert_close(
            group.var((0, 2), correction=0), torch.ones(3).double(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(group, F.batch_norm(values, None, None, training=True))


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_running_statistics_normalize_as_without_groups(layout):
    shape, _, memory_format = LAYOUTS[layout]
    x, weight, bias, residual, dy = make(shape, 1, memory_format, torch.float32)
    running = torch.randn(5), torch.rand(5) + 0.5
    found = []
    for size in (None, 3):

        def function(x, weight, bias, residual, size=size):
            return bn.batch_norm(x, *running, weight, bias, residual=residual, ghost_size=size)

        found.append(step(function, x, weight, bias, residual, dy))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_first_and_second_order(masked):
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((7, 2, 2), 2, 2, (7, 2, 2))]
    mask = weights_of((7, 2, 2), 1) if masked else None

    def function(x, weight, bias, residual):
        return bn.batch_norm(
            x, weight=weight, bias=bias, residual=residual, training=True, activation="gelu",
            mask=mask, eps=0.1, ghost_size=3,
        )  # fmt: skip

    for value in inputs:
        value.requires_grad_()
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.skipif("native" not in BACKENDS, reason="plain calls are those of native")
class TestNative:
    @pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC", "channels at the end"])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_a_call_is_plain_and_gives_the_bits_of_the_long_way(self, layout, dtype, monkeypatch):
        shape, channel_dim, memory_format = LAYOUTS[layout]
        inputs = make(shape, channel_dim, memory_format, dtype)
        found = []
        for plainly in (True, False):
            if not plainly:
                monkeypatch.setattr(plain, "forward", lambda *_: None)
            running = torch.zeros(5), torch.ones(5)

            def function(x, weight, bias, residual, plainly=plainly, running=running):
                y = bn.batch_norm(
                    x, *running, weight, bias, True, residual=residual, activation="relu",
                    channel_dim=channel_dim, ghost_size=3,
                )  # fmt: skip
                assert isinstance(y.grad_fn.call, plain.Plain) == plainly
                return y

            found.append([*step(function, *inputs), *running])
        for short, long in zip(*found, strict=True):
            assert torch.equal(short, long)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("size", [2, 3, 5, 8, 20])  # shared out, or side by side
    def test_threads_do_not_change_a_bit(self, channels_last, masked, size):
        order = torch.channels_last if channels_last else torch.contiguous_format
        inputs = make((40, 6, 20, 20), 1, order, torch.float32)
        mask = weights_of(inputs[0].shape, 1) if masked else None
        found = []
        for threads in (1, 2):
            running = torch.zeros(6), torch.ones(6)

            def function(x, weight, bias, residual, running=running):
                return bn.batch_norm(
                    x, *running, weight, bias, True, residual=residual, activation="relu",
                    mask=mask, ghost_size=size,
                )  # fmt: skip

            torch.set_num_threads(threads)
            try:
                found.append([*step(function, *inputs), *running])
            finally:
                torch.set_num_threads(1)
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)

    def test_what_it_does_not_take_goes_to_eager(self):
        x = torch.randn(3, 8, 5).transpose(0, 1)  # the examples are not outermost in memory
        with bn.backend("native"), pytest.raises(RuntimeError, match="not the outermost"):
            bn.batch_norm(x, training=True, ghost_size=4, channel_dim=2)
        y = bn.batch_norm(x, training=True, ghost_size=4, channel_dim=2)
        torch.testing.assert_close(
            y, bn.batch_norm(x.contiguous(), training=True, ghost_size=4, channel_dim=2)
        )


def test_a_group_that_is_not_finite_leaves_the_others_and_the_statistics():
    x, running = torch.randn(9, 3, 4), (torch.zeros(3), torch.ones(3))
    x[4, 1, 2] = torch.nan
    y = bn.batch_norm(x, *running, training=True, ghost_size=3)
    assert y[3:6, 1].isnan().all()
    torch.testing.assert_close(y[:3], bn.batch_norm(x[:3], training=True))
    assert [v.tolist() for v in running] == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_a_size_that_cannot_be(size):
    with pytest.raises(ValueError, match=r"ghost_size is .*: expected a number of examples"):
        bn.batch_norm(torch.randn(8, 3), training=True, ghost_size=size)


@pytest.mark.parametrize("mean", [1e1, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limits", [None, (1.2, 0.1), (1e3, 1e3)])
def test_float32_keeps_its_digits_at_every_mean(mean, backend, limits):
    inputs = make((8, 5, 30, 30), 1, torch.contiguous_format, torch.float32, mean)
    running = torch.randn(5) + mean, torch.rand(5) * 4 + 1

    def function(x, weight, bias, residual):
        return bn.batch_norm(
            x, *(v.clone() for v in running), weight, bias, True, residual=residual, ghost_size=3,
            renorm=limits,
        )  # fmt: skip

    with bn.backend(backend):
        found = step(function, *inputs)
    options = {} if limits is None else {"running": [as_numpy(v) for v in running]}
    expected = expected_step(*inputs, ghost_size=3, renorm=limits, **options)
    assert_steps_close(found, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("renorm", [None, (1.2, 0.1)])
def test_y_is_written_over_the_input_where_that_is_asked_for(backend, renorm):
    x, running = torch.randn(8, 3, 4), (torch.randn(3), torch.rand(3) + 0.5)
    with bn.backend(backend), torch.no_grad():
        expected, y = (
            bn.batch_norm(
                x, *(v.clone() for v in running), training=True, ghost_size=3, renorm=renorm,
                inplace=inplace,
            )
            for inplace in (False, True)
        )  # fmt: skip
    assert y is x
    assert torch.equal(y, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_old_tracer_sees_operations():
    def function(x):
        return bn.batch_norm(x, training=True, ghost_size=4)

    x = torch.randn(10, 3, 4)
    traced = torch.jit.trace(function, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), function(x))


def test_vmap_cuts_each_batch_into_groups():
    x, weight = torch.randn(4, 7, 3), torch.randn(4, 3)

    def function(x, weight):
        return bn.batch_norm(x, weight=weight, training=True, activation="silu", ghost_size=3)

    expected = torch.stack([function(*pair) for pair in zip(x, weight, strict=True)])
    torch.testing.assert_close(torch.func.vmap(function)(x, weight), expected)


def test_a_full_graph_gives_the_same():
    torch._dynamo.reset()
    inputs = make((7, 5, 4), 1, torch.contiguous_format, torch.float32)
    mask, found = weights_of((7, 5, 4), 1), []
    compiled = torch.compile(bn.batch_norm, fullgraph=True, backend="aot_eager")
    for call in (bn.batch_norm, compiled):
        running = torch.zeros(5), torch.ones(5)

        def function(x, weight, bias, residual, call=call, running=running):
            return call(
                x, *running, weight, bias, True, residual=residual, mask=mask, activation="relu",
                ghost_size=3,
            )  # fmt: skip

        found.append([*step(function, *inputs), *running])
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(truth, mine)


def test_compiled_code_serves_batches_of_any_size():
    from torch._dynamo.testing import CompileCounter  # which takes its time

    torch._dynamo.reset()
    count = CompileCounter()
    compiled = torch.compile(bn.batch_norm, fullgraph=True, backend=count, dynamic=True)
    for examples in (9, 10, 11, 13, 14, 15, 17, 18):
        x = torch.randn(examples, 3, 2)
        expected = bn.batch_norm(x, training=True, ghost_size=4)
        torch.testing.assert_close(compiled(x, training=True, ghost_size=4), expected)
    assert count.frame_count == 1


def test_the_operators_promise_the_shapes_that_they_return():
    x, weight, dy = torch.randn(7, 3, 2, requires_grad=True), torch.ones(3), torch.randn(7, 3, 2)
    form = 1, 1e-5, 0.0, "relu", None, 3
    arguments = x, weight, None, None, None, None, None, *form
    torch.library.opcheck(torch.ops.batchnorm.forward.default, arguments)
    _, mean, inverse_std, _, count = torch.ops.batchnorm.forward.default(*arguments)
    arguments = dy, x.detach(), mean, inverse_std, weight, None, None, None, *form, count
    torch.library.opcheck(
        torch.ops.batchnorm.backward.default, (*arguments, [True, True, False, False])
    )
