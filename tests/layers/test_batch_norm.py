"""The layers held to `torch.nn`: arguments, state, errors, and everything that runs a module."""

import copy
import inspect
import io
import itertools
import shutil

import pytest
import torch
from support import FLOATS, assert_close, parameter_dtype
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

#: Ours, torch's, and a shape it takes with 4 channels.
PAIRS = [
    (bn.BatchNorm1d, nn.BatchNorm1d, (6, 4)),
    (bn.BatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (bn.BatchNorm2d, nn.BatchNorm2d, (6, 4, 3, 5)),
    (bn.BatchNorm3d, nn.BatchNorm3d, (6, 4, 3, 2, 2)),
]
OPTIONS = [
    {},
    {"eps": 1e-2, "momentum": 0.4},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_is_a_drop_in_for_torch_through_training_and_evaluation(
    ours, theirs, shape, options, dtype
):
    wide = parameter_dtype(dtype)
    stock = theirs(4, **options, dtype=wide)
    layer = ours(4, **options, dtype=wide)
    for parameter in stock.parameters():
        nn.init.uniform_(parameter, -1, 1)
    layer.load_state_dict(stock.state_dict())
    for training in (True, True, True, False, False):
        results = []
        x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        for module in (stock, layer):
            module.train(training).zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        for expected, actual in zip(*results, strict=True):
            assert_close(actual, expected, dtype, "sum", scale=4)
    assert list(layer.state_dict()) == list(stock.state_dict())
    for name, expected in stock.state_dict().items():
        actual = layer.state_dict()[name]
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert_close(actual, expected, wide, "sum")


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_knows_torch_and_is_known_by_it(ours, theirs, shape):
    layer = ours(4)
    assert isinstance(layer, theirs)
    assert isinstance(layer, bn.BatchNorm)
    assert repr(layer) == repr(theirs(4))
    positional = [
        p.name
        for p in inspect.signature(theirs).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    signature = inspect.signature(ours).parameters.values()
    assert [p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    defaults = {p.name: p.default for p in inspect.signature(theirs).parameters.values()}
    assert {p.name: p.default for p in signature if p.name in defaults} == defaults


def test_repr_says_what_is_different():
    layer = bn.BatchNorm(
        3, channel_dim=-1, activation=("leaky_relu", 0.2), correction=1, on_small_batch="skip"
    )
    assert repr(layer) == (
        "BatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "channel_dim=-1, activation=('leaky_relu', 0.2), correction=1, on_small_batch='skip')"
    )


def test_inplace_writes_over_the_input_and_is_no_state():
    layer, other = bn.BatchNorm2d(3, inplace=True), bn.BatchNorm2d(3)
    assert repr(layer).endswith("track_running_stats=True, inplace=True)")
    assert list(layer.state_dict()) == list(other.state_dict())
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        expected = other(x)
        assert layer(x) is x
    assert torch.equal(x, expected)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\).*\n?\[in BatchNorm2d"):
        layer(x)


def test_old_checkpoints_without_num_batches_tracked_load():
    state = nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = bn.BatchNorm2d(4)
    assert layer.load_state_dict(state).missing_keys == []
    assert layer.num_batches_tracked == 0
    state = nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key"):  # as in torch: a new one must have it
        layer.load_state_dict(state)


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_errors_begin_with_those_of_torch(ours, theirs, shape):
    cases = [
        torch.zeros(4),
        torch.zeros(4, 4, 1, 1, 1, 1),
        torch.zeros(1, 4, *[1] * len(shape[2:])),
    ]
    for x in cases:
        with pytest.raises(ValueError, match="xpected") as expected:
            theirs(4)(x)
        with pytest.raises(ValueError, match="xpected") as actual:
            ours(4)(x)
        assert str(actual.value).startswith(str(expected.value))
    with pytest.raises(RuntimeError, match="running_mean should contain 3 elements not 4"):
        ours(4)(torch.zeros(2, 3, *[2] * len(shape[2:])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "mish"}, "'mish': expected None or one of relu, leaky_relu"),
        ({"on_small_batch": "ignore"}, "'ignore': expected 'error', 'running' or 'skip'"),
        ({"on_small_batch": "running", "track_running_stats": False}, "track_running_stats=True"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_the_layer_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        bn.BatchNorm1d(3, **options)


@pytest.mark.parametrize("choice", ["running", "skip"])
def test_on_small_batch_lets_the_last_batch_through(choice):
    layer = bn.BatchNorm1d(3, on_small_batch=choice)
    layer(torch.randn(8, 3))
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.randn(1, 3))
    assert y.isfinite().all()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_one_example_alone_is_predicted_in_evaluation():
    layer = bn.BatchNorm1d(3)
    for _ in range(50):
        layer(torch.randn(32, 3) * 2 + 1)
    batch = torch.randn(5, 3)
    layer.eval()
    alone = torch.cat([layer(example[None]) for example in batch])
    torch.testing.assert_close(alone, layer(batch), rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_statistics_stay_float32_through_half(half):
    layer = bn.BatchNorm2d(3)
    with torch.no_grad():
        layer.running_mean.fill_(1 / 3)
    exact = layer.running_mean.clone()
    for module in (layer.to(half), bn.BatchNorm2d(3, dtype=half)):
        assert module.weight.dtype == half
        assert module.running_mean.dtype == module.running_var.dtype == torch.float32
    assert torch.equal(layer.running_mean, exact)
    y = layer(torch.randn(4, 3, 5, 5, dtype=half))
    assert y.dtype == half
    state = {name: value.to(half) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.double().running_mean.dtype == torch.float64
    assert layer.float().running_mean.dtype == torch.float32


def test_survives_copying_pickling_and_devices():
    layer = bn.BatchNorm1d(3, activation=("elu", 0.5), channel_dim=-1)
    layer(torch.randn(8, 3))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    x = torch.randn(4, 3)
    for twin in (copy.deepcopy(layer), again):
        torch.testing.assert_close(twin.eval()(x), layer.eval()(x))
    assert bn.BatchNorm1d(3, device="meta").to_empty(device="cpu").weight.shape == (3,)


def test_channels_last_stays_channels_last():
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    for layer in (bn.BatchNorm2d(3), bn.BatchNorm2d(3, activation="gelu").eval()):
        y = layer(x, residual=x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert dx.is_contiguous(memory_format=torch.channels_last)


class Twice(nn.Module):
    """A network in which the layer stands between two others."""

    def __init__(self, **options):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 5), bn.BatchNorm1d(5, **options), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_under_checkpoint_updates_nothing(use_reentrant):
    plain, checkpointed = Twice(), None
    checkpointed = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(8, 3, requires_grad=True)
        dy = torch.randn(8, 2)
        plain(x).backward(dy)
        checkpoint(checkpointed, x, use_reentrant=use_reentrant).backward(dy)
    assert checkpointed.norm.num_batches_tracked == 3
    for ours, expected in zip(
        itertools.chain(checkpointed.buffers(), (p.grad for p in checkpointed.parameters())),
        itertools.chain(plain.buffers(), (p.grad for p in plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


def test_two_forwards_and_one_backward_where_buffers_change_in_between():
    model = Twice()
    first, second = model(torch.randn(8, 3)), model.eval()(torch.randn(8, 3))
    model.norm.running_mean.zero_()
    model.norm.running_var.fill_(2)
    (first.sum() * second.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def _ddp_worker(rank, rendezvous, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    try:
        torch.manual_seed(0)
        model = Twice()
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
        torch.manual_seed(rank)
        x = torch.randn(2, 8, 3)
        loss = parallel(x[0]).square().mean() + parallel(x[1]).square().mean()
        loss.backward()
        results[rank] = [p.grad.numpy() for p in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()


def test_two_forwards_and_one_backward_under_ddp(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_ddp_worker, (tmp_path / "rendezvous", results), nprocs=2)
        found = dict(results)
    torch.manual_seed(0)
    model = Twice()
    for rank in range(2):
        torch.manual_seed(rank)
        x = torch.randn(2, 8, 3)
        ((model(x[0]).square().mean() + model(x[1]).square().mean()) / 2).backward()
    for rank in range(2):
        for gradient, parameter in zip(found[rank], model.parameters(), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(gradient), parameter.grad, rtol=1e-4, atol=1e-6
            )


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        "options", [{}, {"activation": "gelu"}, {"momentum": None, "affine": False}], ids=str
    )
    def test_full_graph_gives_the_same_values_gradients_and_statistics(self, options, training):
        eager = Twice(**options).train(training)
        model = copy.deepcopy(eager)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x, dy = torch.randn(8, 3), torch.randn(8, 2)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            ys = eager(leaves[0]), compiled(leaves[1])
            for y in ys:
                y.backward(dy)
            torch.testing.assert_close(*ys)
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        torch.testing.assert_close(model.state_dict(), eager.state_dict())

    @pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
    def test_inductor_with_residual_and_mask_on_images(self):
        eager = bn.BatchNorm2d(3, activation="relu")
        layer = copy.deepcopy(eager)
        compiled = torch.compile(layer, fullgraph=True)
        x, residual, dy = (torch.randn(4, 3, 5, 5) for _ in range(3))
        mask = torch.rand(4, 5, 5) > 0.3
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        ys = eager(leaves[0], residual, mask), compiled(leaves[1], residual, mask)
        for y in ys:
            y.backward(dy)
        torch.testing.assert_close(*ys)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("inside", [False, True])
    def test_a_checkpoint_of_compiled_code_updates_once(self, use_reentrant, inside):
        layer, x = bn.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
        if inside:
            function = torch.compile(
                lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager"
            )
        else:
            compiled = torch.compile(layer, backend="aot_eager")

            def function(x):
                return checkpoint(compiled, x, use_reentrant=use_reentrant)

        for _ in range(3):
            function(x).backward(torch.randn(8, 3))
        assert layer.num_batches_tracked == 3

    def test_compiled_code_keeps_no_buffer_either(self):
        layer = bn.BatchNorm1d(3).eval()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 3, requires_grad=True)
        first = compiled(x)
        layer.train()
        second = compiled(x)
        (first * second).sum().backward()
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("shape", [(1, 3), (8, 4), (8, 3, 2, 2)])
    def test_errors_say_what_is_wrong(self, shape):
        layer = bn.BatchNorm1d(3)
        with pytest.raises(Exception, match=r"xpected|should contain"):
            torch.compile(layer, backend="aot_eager")(torch.zeros(shape))

    def test_dynamic_batch_sizes_compile_once_more_at_most(self):
        layer = bn.BatchNorm1d(3)
        torch._dynamo.reset()
        count = CompileCounter()
        compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
        for size in (5, 6, 7, 8):
            torch.testing.assert_close(compiled(x := torch.randn(size, 3)), copy.deepcopy(layer)(x))
        assert count.frame_count == 1


class TestExport:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("strict", [True, False])
    def test_a_model_with_the_layer_exports_and_gives_the_same(self, training, strict):
        model = Twice(activation="relu").train(training)
        x = torch.randn(8, 3)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(model, (x,), dynamic_shapes=[{0: batch}], strict=strict)
        exported, again = program.module(check_guards=False), torch.randn(5, 3)
        torch.testing.assert_close(exported(again), copy.deepcopy(model)(again))

    def test_it_is_saved_and_loaded(self, tmp_path):
        model, x = Twice().eval(), torch.randn(4, 3)
        path = tmp_path / "model.pt2"
        torch.export.save(torch.export.export(model, (x,)), path)
        torch.testing.assert_close(torch.export.load(path).module()(x), model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
def test_the_old_tracer_sees_operations(training):
    model, x = Twice().train(training), torch.randn(8, 3)
    traced = torch.jit.trace(copy.deepcopy(model), (x,), check_trace=False)
    torch.testing.assert_close(traced(x), model(x))


def test_functional_call_and_vmap_over_models():
    models = [Twice() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 8, 3)

    def call(params, buffers, x):
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    expected = torch.stack([copy.deepcopy(m)(part) for m, part in zip(models, x, strict=True)])
    y = torch.func.vmap(call)(params, buffers, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        buffers["norm.num_batches_tracked"], torch.ones(3, dtype=torch.int64)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_statistics_wide(dtype):
    model = Twice()
    with torch.autocast("cpu", dtype=dtype):
        y = model(torch.randn(64, 3))
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert model.norm.running_mean.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_complex_layer_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match=r"dtype is torch\.complex64"):
        bn.BatchNorm1d(3, dtype=torch.complex64)
