"""What only a GPU can show: graphs, streams, the host that never waits, other compilers, NCCL.

`make test-gpu` runs these and the tests of the programs, on it.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.functional.synchronized import Synchronized
from batchnorm.kernels import Activation, Form, Given, Needs, choose, steps, triton

pytestmark = pytest.mark.skipif(
    os.environ.get("BATCHNORM_TEST_DEVICE") != "cuda", reason="make test-gpu runs it, on a GPU"
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(shape=(32, 64, 28, 28), dtype=torch.bfloat16, layout=torch.channels_last):
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
    return x.requires_grad_(), torch.randn_like(x)


def layer_of(channels=64, **settings):
    return bn.BatchNorm2d(channels, activation="relu", **settings).cuda()


def gradients(layer, x, dy):
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def test_triton_serves():
    x, _ = batch()
    assert choose(x, Form()).name == "triton"
    assert triton.takes(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (64, 512, 7, 7), (2, 3, 500, 500)])
def test_every_run_gives_the_same_bits(layout, dtype, shape):
    x, dy = batch(shape, dtype, layout)
    layer = layer_of(shape[1])
    first = gradients(layer, x, dy)
    for _ in range(10):
        torch.cuda.memory.empty_cache()
        for one, other in zip(first, gradients(layer, x, dy), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (64, 512, 7, 7), (256, 64, 56, 56)])
def test_agrees_with_torch(layout, dtype, shape):
    x, dy = batch(shape, dtype, layout)
    theirs = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.ReLU()).cuda()
    mine = layer_of(shape[1])
    bound = 1e-5 if dtype == torch.float32 else 2**-6
    for one, other in zip(gradients(mine, x, dy), gradients(theirs, x, dy), strict=True):
        error = (one.double() - other.double()).abs()
        # a value at the kink of ReLU may be on either side of it
        assert error.mean() <= bound * other.double().abs().max()
    torch.testing.assert_close(mine.running_mean, theirs[0].running_mean)
    torch.testing.assert_close(mine.running_var, theirs[0].running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("settings", [{}, {"ghost_size": 8}, {"momentum": None}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_host_waits_for_nothing(settings, masked):
    x, dy = batch()
    layer = layer_of(**settings)
    mask = torch.ones(32, 1, 28, 28, device="cuda") if masked else None
    layer(x, mask=mask).backward(dy)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x, mask=mask).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (64, 512, 7, 7)])
def test_a_step_is_captured_in_a_graph(layout, shape):
    x, dy = batch(shape, layout=layout)
    layer = layer_of(shape[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(layer, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(layer, x, dy)
    tracked = int(layer.num_batches_tracked)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert int(layer.num_batches_tracked) == tracked + 3
    for one, other in zip(captured, gradients(layer, x, dy), strict=True):
        assert torch.equal(one, other)


def test_streams_beside_each_other():
    layers = [layer_of() for _ in range(4)]
    inputs = [batch() for _ in layers]
    expected = [gradients(layer, *given) for layer, given in zip(layers, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    found = [None] * len(layers)
    for _ in range(20):
        for at, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[at] = gradients(layers[at], *inputs[at])
        torch.cuda.synchronize()
        for mine, theirs in zip(found, expected, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode):
    x, dy = batch()
    layer = layer_of()
    expected = gradients(layer, x, dy)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(4):
        found = [v.clone() for v in gradients(compiled, x, dy)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_and_the_scaler_of_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), layer_of(), nn.Flatten(), nn.Linear(64 * 900, 10))
    model = model.cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda")
    x = torch.randn(16, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (16,), device="cuda")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def test_more_than_2_to_the_31_values():
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("it takes 40 GB")
    examples = 2**31 // (64 * 128 * 128) + 9
    x = torch.randn(examples, 64, 128, 128, device="cuda", dtype=torch.bfloat16)
    form = Form(activation=Activation.parse("relu"))
    backend = choose(x, form)
    for layout in LAYOUTS:
        x = x.contiguous(memory_format=layout)
        y, moments, mean, inverse_std = backend.forward(x, None, None, None, None, form, None)
        tail = x[-9:].double()
        wanted = ((tail - mean.view(-1, 1, 1)) * inverse_std.view(-1, 1, 1)).relu()
        assert (y[-9:].double() - wanted).abs().max() < 2**-6 * wanted.max()
        assert abs(float(moments.mean.mean())) < 1e-3
        given = Given(x, mean, inverse_std, None, None, None, None, form)
        del y
        assert backend.backward(x, given, moments.count, Needs()).x.isfinite().all()


@pytest.fixture
def process():
    """One process, with NCCL."""
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29533", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("masked", [False, True])
def test_moments_and_sums_go_through_nccl(masked):
    x, dy = batch()
    weight, bias = (torch.randn(64, device="cuda") for _ in range(2))
    mask = torch.ones(32, 1, 28, 28, device="cuda") if masked else None
    form, backend = Form(activation=Activation.parse("relu")), choose(x, Form())
    found = []
    for pool in (None, Synchronized(dist.group.WORLD)):
        of, _ = steps.forward(backend, x, weight, bias, None, mask, form, pool=pool)
        given = Given(x, of.mean, of.inverse_std, weight, bias, None, mask, form)
        back = steps.backward(backend, dy, given, of.moments.count, Needs(), pool)
        found.append((of.y, of.moments.mean, back.x, back.weight, back.bias))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_in_parallel(parallel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), layer_of()).cuda()
    plain = copy.deepcopy(model)
    x, dy = batch(dtype=torch.float32)
    dy = dy[..., 1:-1, 1:-1]
    if parallel == "ddp":
        ours = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        ours = fully_shard(model)
    for each in (ours, plain):
        each(x).backward(dy)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        grad = one.grad.full_tensor() if parallel == "fsdp" else one.grad
        torch.testing.assert_close(grad, other.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    x, dy = batch()
    layer = layer_of()
    expected = gradients(layer, x, dy)
    with torch.cuda.device(0):
        other, upstream = (v.detach().to("cuda:1") for v in (x, dy))
        found = gradients(copy.deepcopy(layer).to("cuda:1"), other.requires_grad_(), upstream)
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one, two.to("cuda:0"))


def test_steps_of_more_than_31_bits():
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("it takes 20 GB")
    far = torch.empty(2**32 + 64, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(2, 2, 8, device="cuda").bfloat16()
    for strides in ((2**31, 8, 1), (2**31 + 1, 8, 1), (16, 2**31, 1)):
        x = far.as_strided((2, 2, 8), strides).copy_(values)
        for channel_dim in (0, 1, 2):
            form = Form(channel_dim)
            backend = choose(x, form)
            found = backend.forward(x, None, None, None, None, form, None)
            expected = backend.forward(values, None, None, None, None, form, None)
            torch.testing.assert_close(found.y, expected.y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 64, 14, 14), (48, 256, 14, 14)])
def test_programs_that_wait_for_each_other(layout, shape, monkeypatch):
    """They hold a channel together, in a cooperative launch."""
    from batchnorm.kernels.triton import backend, plan

    x, dy = batch(shape, layout=layout)
    layer = layer_of(shape[1])
    expected = gradients(layer, x, dy)
    reckoned = backend.cut_of

    def together(of, x, work="", run=None):
        sms = plan.multiprocessors(x.device)
        if not work:
            return reckoned(of, x)
        shared = plan.shared(of, x.element_size(), sms, plan.HELD)
        assert shared is not None
        return shared

    monkeypatch.setattr(backend, "cut_of", together)
    for _ in range(5):
        for one, other in zip(gradients(layer, x, dy), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-2)
