"""The operators: held to what torch asks of one, and to what eager code computes, bit for bit."""

import copy
import shutil

import pytest
import torch
from support import ACTIVATIONS, FLOATS, HALVES, LAYOUTS, make, parameter_dtype
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import make_boxed_compiler
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import batchnorm as bn
from batchnorm.functional import operators
from batchnorm.kernels import Activation, Form, native

FORWARD = torch.ops.batchnorm.forward.default
BACKWARD = torch.ops.batchnorm.backward.default
compiled_kernels = pytest.mark.skipif(native._native is None, reason="not compiled here")
inductor = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def arguments(layout="NCHW", dtype=torch.float32, running=False, activation="relu", masked=True):
    """Return what `batchnorm::forward` takes, with gradients recorded."""
    shape, channel_dim, memory_format = LAYOUTS[layout]
    x, weight, bias, residual, _ = make(shape, channel_dim, memory_format, dtype)
    positions = [1 if d == channel_dim % len(shape) else n for d, n in enumerate(shape)]
    mask = torch.randint(0, 3, positions).to(parameter_dtype(dtype)) if masked else None
    leaves = [v.requires_grad_() for v in (x, weight, bias, residual)]
    statistics = (torch.randn(5), torch.rand(5) + 0.5) if running else (None, None)
    form = Form(channel_dim, activation=Activation.parse(activation))
    return *leaves, mask, *statistics, *operators._numbers(form)


def backward_arguments(needs=(True,) * 4, **options):
    """Return what `batchnorm::backward` takes."""
    given = [v.detach() if isinstance(v, torch.Tensor) else v for v in arguments(**options)]
    y, mean, inverse_std, _, count = FORWARD(*given)
    x, *others = given[:5]
    running, numbers = given[5:7], given[7:]
    count = None if running[0] is not None else count
    dy = torch.randn_like(y)
    return dy, x, mean, inverse_std, *others, *numbers, count, list(needs)


class TestRegistration:
    """`torch.library.opcheck`: schema, fake implementation, autograd, dynamic shapes."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("running", [False, True])
    def test_in_every_layout(self, layout, running):
        torch.library.opcheck(FORWARD, arguments(layout, running=running))
        torch.library.opcheck(BACKWARD, backward_arguments(layout=layout, running=running))

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("masked", [False, True])
    def test_with_every_type(self, dtype, masked):
        torch.library.opcheck(FORWARD, arguments(dtype=dtype, masked=masked))
        torch.library.opcheck(BACKWARD, backward_arguments(dtype=dtype, masked=masked))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_with_every_activation(self, activation):
        torch.library.opcheck(FORWARD, arguments(activation=activation))
        needs = (True, True, True, activation is not None)
        torch.library.opcheck(BACKWARD, backward_arguments(needs, activation=activation))

    @pytest.mark.parametrize("needs", [(True, False, False, False), (False, True, True, False)])
    def test_without_what_is_optional(self, needs):
        x, *_ = arguments()
        plain = x, None, None, None, None, None, None, 1, 1e-5, 1.0, None, None, None
        torch.library.opcheck(FORWARD, plain)
        torch.library.opcheck(BACKWARD, backward_arguments(needs))

    @pytest.mark.parametrize("backend", ["native", "eager"])
    @pytest.mark.parametrize(
        "lay_out",
        [
            lambda x: x[:, :, 1:5],
            lambda x: x[:, :, ::2],
            lambda x: x.transpose(0, 3),
            lambda x: x[:1].expand(4, 5, 6, 7),
            lambda x: x[:1],
            lambda x: x[:0],
            lambda x: x.repeat(16, 1, 16, 16),  # large results lie in memory of our own
        ],
        ids=["slice", "steps", "transposed", "expanded", "one", "none", "large"],
    )
    def test_promises_the_strides_that_results_have(self, backend, lay_out):
        x, dy = (lay_out(torch.randn(4, 5, 6, 7)) for _ in range(2))
        if backend == "native" and native._native is None:
            pytest.skip("not compiled here")
        form = Form(activation=Activation("relu"))
        if backend == "eager" or bn.backends()[0].supports(x, form) is None:
            with bn.backend(backend):
                numbers = operators._numbers(form)
                given = x, None, None, x, None, None, None, *numbers
                torch.library.opcheck(FORWARD, given, test_utils="test_faketensor")
                y, mean, inverse_std, _, count = FORWARD(*given)
                assert y.stride() == torch.empty_like(x).stride() or 0 in x.shape
                saved = dy, x, mean, inverse_std, None, None, x, None, *numbers, count
                needs = [True, False, False, True]
                torch.library.opcheck(BACKWARD, (*saved, needs), test_utils="test_faketensor")

    def test_keeps_x_and_two_numbers_a_channel(self):
        kept = []
        given = arguments(activation=None, masked=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
            FORWARD(*given)
        large = [v for v in kept if v.numel() > 5]
        assert [v.data_ptr() for v in large] == [given[0].data_ptr()]
        small = [v for v in kept if v.numel() == 5 and v is not given[1] and v is not given[2]]
        assert len(small) == 2

    @pytest.mark.parametrize("activation", [None, "silu"])
    def test_gradients_have_the_types_of_their_inputs(self, activation):
        types = torch.bfloat16, torch.float32, torch.float64, torch.float16
        shapes = (8, 3), (3,), (3,), (8, 3)
        inputs = [
            torch.randn(shape).to(dtype).requires_grad_()
            for shape, dtype in zip(shapes, types, strict=True)
        ]
        numbers = operators._numbers(Form(activation=Activation.parse(activation)))
        y, *_ = FORWARD(*inputs, None, None, None, *numbers)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, inputs, dy)
        assert tuple(v.dtype for v in found) == types
        y = bn.batch_norm(
            inputs[0], None, None, *inputs[1:3], True, residual=inputs[3], activation=activation
        )
        for actual, expected in zip(found, torch.autograd.grad(y, inputs, dy), strict=True):
            assert torch.equal(actual, expected)

    def test_statistics_are_not_differentiable(self):
        y, *others = FORWARD(*arguments())
        assert y.requires_grad
        assert not any(v.requires_grad for v in others)


class Recorder:
    """A backend of `torch.compile` that runs what it is given, and keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append(graph)
        return graph

    @property
    def operators(self):
        """The names of ours that were called, in order."""
        return operators_of(*self.graphs)


def operators_of(*graphs):
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    names = [t.split(".")[1] for t in targets if t.startswith("batchnorm.")]
    return [name for name in names if name in ("forward", "backward")]


def whole_step(function, values, dy):
    """Return y and all gradients."""
    leaves = [v.detach().clone().requires_grad_() for v in values]
    y = function(*leaves)
    y.backward(dy)
    return y, *(leaf.grad for leaf in leaves)


@compiled_kernels
class TestCompile:
    @pytest.mark.parametrize("training", [True, False])
    def test_a_training_step_is_one_operator_each_way(self, training):
        recorder = Recorder()
        layer = torch.compile(
            bn.BatchNorm2d(5).train(training),
            fullgraph=True,
            backend=aot_autograd(fw_compiler=make_boxed_compiler(recorder)),
        )
        layer(torch.randn(4, 5, 6, 7, requires_grad=True)).backward(torch.randn(4, 5, 6, 7))
        assert recorder.operators == ["forward", "backward"]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("training", [True, False])
    def test_where_no_gradient_is_recorded_only_training_is(self, mode, training):
        recorder = Recorder()
        layer = bn.BatchNorm1d(3).train(training)
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=recorder)
        with mode():
            x = torch.randn(8, 3)
            torch.testing.assert_close(compiled(x), layer(x))
        assert recorder.operators == ["forward"] * training

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("running", [False, True])
    def test_equals_eager_code_bit_for_bit(self, layout, dtype, running):
        shape, channel_dim, memory_format = LAYOUTS[layout]
        *values, dy = make(shape, channel_dim, memory_format, dtype)
        mask = torch.randint(
            0, 3, [n for d, n in enumerate(shape) if d != channel_dim % len(shape)]
        )
        statistics = (torch.randn(5), torch.rand(5) + 0.5) if running else (None, None)

        def function(x, weight, bias, residual):
            return bn.batch_norm(
                x, *statistics, weight, bias, not running, residual=residual, mask=mask,
                activation="silu", channel_dim=channel_dim,
            )  # fmt: skip

        expected = whole_step(function, values, dy)
        found = whole_step(torch.compile(function, fullgraph=True, backend="aot_eager"), values, dy)
        for actual, wanted in zip(found, expected, strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted)

    @inductor
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_inductor_calls_them_too(self, dtype):
        model = nn.Sequential(
            nn.Conv2d(3, 5, 3), bn.BatchNorm2d(5, activation="relu"), nn.Conv2d(5, 2, 1)
        )
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
        x, dy = torch.randn(4, 3, 8, 8), torch.randn(4, 2, 6, 6)
        for _ in range(2):
            with torch.autocast("cpu", dtype, enabled=dtype in HALVES):
                ys = model(x), compiled(x)
            for y in ys:
                y.backward(dy.to(y.dtype))
            torch.testing.assert_close(*ys)
        for ours, wanted in zip(compiled.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, wanted.grad)
        torch.testing.assert_close(
            dict(compiled._orig_mod.named_buffers()), dict(model.named_buffers())
        )

    @pytest.mark.parametrize("dtype", HALVES)
    def test_under_autocast_the_layer_takes_what_it_is_given(self, dtype):
        recorder = Recorder()
        model = nn.Sequential(nn.Linear(3, 5), bn.BatchNorm1d(5))
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=recorder)
        with torch.autocast("cpu", dtype):
            x = torch.randn(8, 3)
            ys = model(x), compiled(x)
        assert [y.dtype for y in ys] == [dtype, dtype]
        assert torch.equal(*ys)
        assert recorder.operators == ["forward"]

    @pytest.mark.parametrize("masked", [False, True])
    def test_batch_sizes_that_change_compile_nothing_anew(self, masked):
        recorder = Recorder()
        compiled = torch.compile(
            lambda x, mask: bn.batch_norm(x, training=True, mask=mask, activation="relu"),
            fullgraph=True,
            dynamic=True,
            backend=recorder,
        )
        for size in (5, 6, 9, 2):
            x, mask = torch.randn(size, 3), torch.rand(size) > 0.5 if masked else None
            dy = torch.randn(size, 3)
            expected = whole_step(
                lambda x, mask=mask: bn.batch_norm(x, training=True, mask=mask, activation="relu"),
                [x],
                dy,
            )
            found = whole_step(lambda x, mask=mask: compiled(x, mask), [x], dy)
            assert all(map(torch.equal, found, expected))
        assert len(recorder.graphs) == 1
        assert recorder.operators == ["forward"]

    def test_an_empty_batch_and_an_upstream_gradient_of_any_strides(self):
        function = torch.compile(
            lambda x: bn.batch_norm(x, training=True), fullgraph=True, backend="aot_eager"
        )
        y, dx = whole_step(function, [torch.zeros(0, 3)], torch.zeros(0, 3))
        assert y.shape == dx.shape == (0, 3)
        x, dy = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
        expected = whole_step(lambda x: bn.batch_norm(x, training=True), [x], dy)
        for other in (dy.mT.contiguous().mT, dy.repeat(1, 1, 2)[..., :4]):
            assert all(map(torch.equal, whole_step(function, [x], other), expected))
        dx = whole_step(function, [x], torch.ones(()).expand(6, 3, 4))[1]
        torch.testing.assert_close(dx, torch.zeros_like(x), rtol=0, atol=1e-6)

    def test_the_backend_is_chosen_when_it_runs(self):
        compiled = torch.compile(
            lambda x: bn.batch_norm(x, training=True), fullgraph=True, backend="aot_eager"
        )
        x = torch.randn(64, 3) + 1e3
        with torch.no_grad():
            for name in ("native", "eager"):
                with bn.backend(name):
                    assert torch.equal(compiled(x), bn.batch_norm(x, training=True))

    def test_settings_that_change_from_call_to_call(self):
        compiled = torch.compile(
            lambda x, eps: bn.batch_norm(x, training=True, eps=eps), backend="aot_eager"
        )
        x = torch.randn(8, 3)
        for eps in (1e-5, 1e-3, 0.1):
            assert torch.equal(compiled(x, eps), bn.batch_norm(x, training=True, eps=eps))

    def test_a_second_derivative_is_refused_by_the_compiler_and_not_by_eager_code(self):
        x = torch.randn(5, 3, requires_grad=True)
        dy = torch.randn(5, 3)
        compiled = torch.compile(
            lambda x: bn.batch_norm(x, training=True), fullgraph=True, backend="aot_eager"
        )
        (dx,) = torch.autograd.grad(compiled(x), x, dy, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            dx.square().sum().backward()
        y, *_ = FORWARD(x, *[None] * 6, *operators._numbers(Form(eps=0.1)))
        found = torch.autograd.grad(y, x, dy, create_graph=True)[0]
        y = bn.batch_norm(x, training=True, eps=0.1)
        expected = torch.autograd.grad(y, x, dy, create_graph=True)[0]
        torch.testing.assert_close(found, expected)
        second = [torch.autograd.grad(g.square().sum(), x)[0] for g in (found, expected)]
        torch.testing.assert_close(*second)


class TestPlainOperations:
    """Whatever looks into the operations must be shown them, inside a compiler too."""

    def recorded(self, function, *inputs):
        recorder = Recorder()
        compiled = torch.compile(function, fullgraph=True, backend=recorder)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
        return recorder.operators

    def test_under_transforms(self):
        def function(x):
            return bn.batch_norm(x, training=True, activation="tanh")

        x, v = torch.randn(2, 5, 3), torch.randn(5, 3)
        assert self.recorded(torch.func.vmap(function), x) == []
        assert self.recorded(torch.func.grad(lambda x: (function(x) * v).sum()), v) == []
        assert self.recorded(lambda x: torch.func.jvp(function, (x,), (v,)), x[0]) == []

    def test_in_forward_mode(self):
        def function(x, v):
            with forward_ad.dual_level():
                y = bn.batch_norm(forward_ad.make_dual(x, v), training=True)
                return forward_ad.unpack_dual(y).tangent

        x, v = torch.randn(5, 3), torch.randn(5, 3)
        assert self.recorded(function, x, v) == []

    def test_for_subclasses_that_take_operations_apart(self):
        recorder = Recorder()
        compiled = torch.compile(
            lambda x: bn.batch_norm(x, training=True), fullgraph=True, backend=recorder
        )
        x = TwoTensor(torch.randn(5, 3), torch.randn(5, 3))
        y = compiled(x)
        torch.testing.assert_close(y.a, bn.batch_norm(x.a, training=True))
        assert recorder.operators == []

    def test_where_there_are_no_kernels(self, monkeypatch):
        monkeypatch.setattr(native, "_native", None)
        x = torch.randn(5, 3)
        recorder = Recorder()
        torch.compile(lambda x: bn.batch_norm(x, training=True), backend=recorder)(x)
        assert recorder.operators == []

    def test_for_devices_without_kernels(self):
        assert not operators.serve(torch.zeros(2, 3, device="meta"), Form(), True, True)

    def test_for_a_gpu_calls_that_end_in_an_activation(self, monkeypatch):
        monkeypatch.setattr(operators, "is_compiling", lambda: True)
        monkeypatch.setattr(operators.triton, "takes", lambda x: x.device.type == "meta")
        x = torch.zeros(2, 3, device="meta")
        served = [
            operators.serve(x, Form(activation=each), True, True)
            for each in (None, Activation.parse("relu"))
        ]
        assert served == [False, True]


@compiled_kernels
class TestExport:
    @pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_training_has_the_operator_and_inference_has_not(self, strict, training):
        layer = bn.BatchNorm1d(3, activation="relu").train(training)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(
            copy.deepcopy(layer), (torch.randn(8, 3),), dynamic_shapes=[{0: batch}], strict=strict
        )
        assert operators_of(program.graph_module) == ["forward"] * training
        decomposed = program.run_decompositions()
        assert operators_of(decomposed.graph_module) == ["forward"] * training

    def test_inference_by_the_batch_needs_nothing_of_ours_either(self):
        layer = bn.BatchNorm1d(3, track_running_stats=False).eval()
        program = torch.export.export(layer, (torch.randn(8, 3),))
        assert operators_of(program.graph_module) == []

    def test_an_exported_step_gives_the_gradients_and_statistics_of_the_layer(self):
        layer = bn.BatchNorm2d(5, activation="gelu")
        x, dy = torch.randn(4, 5, 6, 7), torch.randn(4, 5, 6, 7)
        program = torch.export.export(copy.deepcopy(layer), (x,))
        exported = program.module()
        found, expected = (whole_step(function, [x], dy) for function in (exported, layer))
        assert all(map(torch.equal, found, expected))
        for ours, wanted in zip(exported.parameters(), layer.parameters(), strict=True):
            assert torch.equal(ours.grad, wanted.grad)
        torch.testing.assert_close(dict(exported.named_buffers()), dict(layer.named_buffers()))

    def test_it_is_saved_and_loaded(self, tmp_path):
        x = torch.randn(8, 3)
        program = torch.export.export(bn.BatchNorm1d(3, activation=("elu", 0.5)), (x,))
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2")
        assert operators_of(again.graph_module) == ["forward"]
        layer = bn.BatchNorm1d(3, activation=("elu", 0.5))
        assert torch.equal(again.module()(x), layer(x))
