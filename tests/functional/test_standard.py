"""Inference as torch's own batch norm: where it is shown, and that it computes the same."""

import itertools

import pytest
import torch
from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    assert_close,
    expected_step,
    make,
    named,
    step,
    weights_of,
)
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import reference
from batchnorm.kernels import native


class Recorder:
    """A backend of `torch.compile` that runs what it is given, and notes what that calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, graph, _):
        self.calls += [node.target for node in graph.graph.nodes if node.op.startswith("call_")]
        return graph


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function, *inputs):
    """Return what a compiled function returns without a gradient, and what was called."""
    recorder = Recorder()
    with torch.no_grad():
        y = torch.compile(function, fullgraph=True, backend=recorder)(*inputs)
    return y, recorder.calls


def statistics():
    return torch.randn(5), torch.rand(5) + 0.5


@pytest.mark.parametrize(
    ("layout", "dtype", "activation"),
    [
        *((layout, torch.float32, None) for layout in LAYOUTS),
        *itertools.product(["NHWC", "channels at the end"], FLOATS, [None, "silu"]),
    ],
)
def test_equals_the_reference_and_keeps_the_layout(layout, dtype, activation):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    x, weight, bias, residual, _ = make(shape, channel_dim, memory_format, dtype)
    residual = None if activation is None else residual
    mean, var = statistics()

    def function(x, residual):
        return bn.batch_norm(
            x, mean, var, weight, bias, residual=residual, activation=activation,
            channel_dim=channel_dim,
        )  # fmt: skip

    y, calls = compiled(function, x, residual)
    expected = reference.forward(
        *(v.double().numpy() for v in (x, weight, bias)),
        residual=None if residual is None else residual.double().numpy(),
        running=(mean.double().numpy(), var.double().numpy()),
        axis=channel_dim, **named(activation),
    )  # fmt: skip
    assert_close(y, expected, dtype)
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    assert calls.count(F.batch_norm) == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_followed_by_torchs_own_activation(activation):
    x, (mean, var) = torch.randn(6, 5), statistics()
    y, calls = compiled(lambda x: bn.batch_norm(x, mean, var, activation=activation), x)
    torch.testing.assert_close(y, bn.batch_norm(x, mean, var, activation=activation))
    assert len(calls) == 1 + (activation is not None)
    assert calls[0] is F.batch_norm


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(5, 5, 5, 5),
        lambda x: x[:0],
    ],
    ids=["inner", "outer", "steps", "expanded", "none"],
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_is_laid_out_otherwise(lay_out, backend):
    """The strides that are traced are those that come out, so what follows may rely on them."""
    x, (mean, var) = lay_out(torch.randn(5, 5, 5, 5)), statistics()

    def function(x, channel_dim):
        return bn.batch_norm(x, mean, var, channel_dim=channel_dim)

    traced = torch.compile(function, fullgraph=True, backend=backend)
    with torch.no_grad():
        for channel_dim in range(-1, 3):
            if x.shape[channel_dim] == 5:
                y, expected = traced(x, channel_dim), function(x, channel_dim)
                torch.testing.assert_close(y, expected)
                assert y.stride() == expected.stride()


@pytest.mark.parametrize("shape", [(5,), (2, 5, 1, 2, 1, 3)])
def test_any_rank(shape):
    x, (mean, var) = torch.randn(shape), statistics()
    channel_dim = shape.index(5)

    def function(x):
        return bn.batch_norm(x, mean, var, channel_dim=channel_dim)

    y, calls = compiled(function, x)
    torch.testing.assert_close(y, function(x))
    assert F.batch_norm in calls


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("others", [(F32, F32), (BF16, F32), (BF16, BF16), (F64, F64)])
def test_types_that_are_mixed(dtype, others):
    x = torch.randn(6, 5).to(dtype)
    weight, mean = (torch.randn(5).to(other) for other in others)
    var = (torch.rand(5) + 0.5).to(mean.dtype)

    def function(x):
        return bn.batch_norm(x, mean, var, weight)

    y, calls = compiled(function, x)
    assert y.dtype == x.dtype
    assert_close(y, function(x), x.dtype)
    assert F.batch_norm in calls


@pytest.mark.parametrize("mask", [None, torch.tensor([[True], [False], [True], [False]])])
def test_a_mask_hides_what_is_not_finite(mask):
    x, (mean, var) = torch.randn(4, 5), statistics()
    x[1] = float("nan")
    y, calls = compiled(lambda x: bn.batch_norm(x, mean, var, mask=mask), x)
    torch.testing.assert_close(y, bn.batch_norm(x, mean, var, mask=mask), equal_nan=True)
    assert bool(y.isfinite().all()) == (mask is not None)
    assert F.batch_norm in calls


def test_is_written_over_the_input_where_that_was_asked_for():
    x, (mean, var) = torch.randn(4, 5), statistics()
    expected = bn.batch_norm(x, mean, var)
    y, _ = compiled(lambda x: bn.batch_norm(x, mean, var, inplace=True), x)
    torch.testing.assert_close(x, expected)
    assert y.data_ptr() == x.data_ptr()


def test_batch_sizes_that_change_compile_nothing_anew():
    recorder, (mean, var) = Recorder(), statistics()
    function = torch.compile(
        lambda x: bn.batch_norm(x, mean, var, channel_dim=-1, activation="relu"),
        fullgraph=True, dynamic=True, backend=recorder,
    )  # fmt: skip
    with torch.no_grad():
        for size in (4, 7, 2):
            x = torch.randn(size, 3 + size, 5)
            expected = bn.batch_norm(x, mean, var, channel_dim=-1, activation="relu")
            torch.testing.assert_close(function(x), expected)
    assert recorder.calls.count(F.batch_norm) == 1


class TestGradients:
    """Where there are no kernels, a training step of a frozen layer has the node, too."""

    @pytest.fixture(autouse=True)
    def _without_kernels(self, monkeypatch):
        monkeypatch.setattr(native, "_native", None)

    @pytest.mark.parametrize("layout", ["NCHW", "channels at the end"])
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_are_those_of_the_statistics_of_the_forward_pass(self, layout, backend):
        shape, channel_dim, memory_format = LAYOUTS[layout]
        x, weight, bias, residual, dy = make(shape, channel_dim, memory_format, torch.float64)
        mean, var = (v.double() for v in statistics())
        running = mean.numpy().copy(), var.numpy().copy()
        compiled = torch.compile(
            lambda x, weight, bias, residual: bn.batch_norm(
                x, mean, var, weight, bias, residual=residual, activation="tanh",
                channel_dim=channel_dim,
            ),
            fullgraph=True, backend=backend,
        )  # fmt: skip

        def function(*values):
            y = compiled(*values)
            mean.add_(1)  # as a training step elsewhere may
            var.mul_(2)
            return y

        found = step(function, x, weight, bias, residual, dy)
        expected = expected_step(
            x, weight, bias, residual, dy, "tanh", axis=channel_dim, running=running
        )
        for actual, truth in zip(found, expected, strict=True):
            assert_close(actual, truth, torch.float64, "sum")

    def test_a_layer_that_updates_what_normalizes_it_has_plain_operations(self):
        recorder = Recorder()
        layer = bn.BatchNorm1d(5, statistics="running", update="always")
        torch.compile(layer, fullgraph=True, backend=recorder)(torch.randn(4, 5))
        assert F.batch_norm not in recorder.calls


def test_transforms_see_plain_operations():
    x, v, (mean, var) = torch.randn(3, 4, 5), torch.randn(3, 4, 5), statistics()

    def function(x):
        return bn.batch_norm(x, mean, var)

    for transformed in (
        torch.func.vmap(function),
        torch.func.grad(lambda x: function(x[0]).square().sum()),
        lambda x: torch.func.jvp(function, (x[0],), (v[0],)),
    ):
        y, calls = compiled(transformed, x)
        torch.testing.assert_close(y, transformed(x))
        assert F.batch_norm not in calls


def test_training_is_shown_as_it_was():
    for layer in (bn.BatchNorm1d(5), bn.BatchNorm1d(5, track_running_stats=False).eval()):
        _, calls = compiled(layer, torch.randn(4, 5))
        assert F.batch_norm not in calls


def test_a_mask_of_weights_is_no_node_of_an_exported_graph():
    x, mask = torch.randn(4, 5), weights_of((4, 5), 1)
    program = torch.export.export(bn.BatchNorm1d(5).eval(), (x,), {"mask": mask})
    targets = [str(node.target) for node in program.graph.nodes]
    assert "aten.promote_types.default" not in targets
    assert "aten.batch_norm.default" in targets


def test_the_node_is_that_of_the_layer_of_torch():
    theirs, ours = (lib.BatchNorm2d(5, eps=1e-3).eval() for lib in (nn, bn))
    graphs = []
    for layer in (theirs, ours):
        program = torch.export.export(layer, (torch.randn(2, 5, 3, 3),))
        (node,) = (n for n in program.graph.nodes if n.op == "call_function")
        args = [str(a) for a in node.args]
        graphs.append((node.target, args[:6], args[7]))  # but for the momentum, which is not used
    assert graphs[0] == graphs[1]
