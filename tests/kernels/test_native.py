"""What is particular to the kernels in C++: layouts, threads, instruction sets, memory."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import ACTIVATIONS, FLOATS, TOLERANCES, as_numpy, assert_close, named, parameter_dtype

import batchnorm as bn
from batchnorm import reference
from batchnorm.kernels import Activation, Form, Given, Needs, backends, native
from batchnorm.kernels.eager import Eager
from batchnorm.kernels.layouts import is_dense

NATIVE = next(backend for backend in backends() if backend.name == "native")
pytestmark = pytest.mark.skipif(NATIVE.available() is not None, reason="not compiled here")


@pytest.fixture(params=native.instructions())
def instructions(request):
    """Run the test once with each instruction set of this machine."""
    native._native.use_instructions(request.param)
    yield request.param
    native._native.use_instructions(native.instructions()[0])


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(x, dy, *, weight=None, bias=None, residual=None, mask=None, form=None, backend=NATIVE):
    """Return y, the gradients and the moments, by the two fused calls."""
    form = form or Form()
    y, moments, mean, inverse_std = backend.forward(x, weight, bias, residual, mask, form, None)
    given = Given(x, mean, inverse_std, weight, bias, residual, mask, form)
    return y, backend.backward(dy, given, moments.count, Needs()), moments


def random(shape, order, dtype=torch.float32, offset=0):
    """Return random values whose dimensions lie in memory in some order, at some offset."""
    size = int(np.prod(shape))
    flat = torch.randn(size + offset).to(dtype)[offset:]
    return flat.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_drawn_batches_equal_the_reference(data, instructions):
    sizes = st.sampled_from([0, 1, 1, 2, 3, 5, 8, 17, 33])
    shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=4), label="shape"))
    channel_dim = data.draw(st.integers(0, len(shape) - 1), label="channel_dim")
    order = data.draw(st.permutations(range(len(shape))), label="order")
    dtype = data.draw(st.sampled_from(FLOATS), label="dtype")
    activation = data.draw(st.sampled_from(ACTIVATIONS), label="activation")
    offset = data.draw(st.integers(0, 3), label="offset")
    correction = data.draw(st.sampled_from([0, 1]), label="correction")
    wide = parameter_dtype(dtype)
    channels = shape[channel_dim]
    x, dy, residual = (random(shape, list(order), dtype, offset) for _ in range(3))
    largest = 6 if wide == dtype else 1
    x = (x * 2 + 10.0 ** data.draw(st.integers(-2, largest), label="mean")).to(dtype)
    if channels > 1 and data.draw(st.booleans(), label="constant channel"):
        x.select(channel_dim, 0).fill_(0.1)
    if data.draw(st.booleans(), label="strided"):
        d = data.draw(st.integers(0, len(shape) - 1), label="in dimension")
        x, dy, residual = (v.narrow(d, 0, shape[d] // 2) for v in (x, dy, residual))
        channels = x.shape[channel_dim]
    form = Form(channel_dim, correction=correction, activation=Activation.parse(activation))
    assume(NATIVE.supports(x, form) is None)
    weight, bias = torch.randn(channels, dtype=wide), torch.randn(channels, dtype=wide)
    positions = [n for d, n in enumerate(x.shape) if d != channel_dim]
    mask = weights = None
    if data.draw(st.booleans(), label="masked"):
        weights = torch.randint(0, 3, positions)
        mask = weights.unsqueeze(channel_dim).to(wide)
    if not data.draw(st.booleans(), label="with residual"):
        residual = None
    y, found, moments = step(
        x, dy, weight=weight, bias=bias, residual=residual, mask=mask, form=form
    )
    options = {
        "axis": channel_dim,
        "weights": weights,
        "correction": correction,
        "residual": None if residual is None else as_numpy(residual),
        **named(activation),
    }
    args = [as_numpy(v) for v in (x, weight, bias)]
    gradients = reference.backward(as_numpy(dy), *args, **options)
    expected = reference.moments(args[0], channel_dim, weights)
    if channels or mask is None:  # the weights of no channel are not added up
        assert moments.count == expected.count
    assert (moments.m2 >= 0).all()
    # a channel that is nearly constant magnifies what its mean in the wide type rounds
    magnified = (np.abs(expected.mean) * 1e-13 / np.sqrt(expected.var() + 1e-5)).max(initial=0)
    slack = 2 + (magnified / 1e-13 if dtype == torch.float64 else 0)
    assert_close(y, reference.forward(*args, **options), dtype, scale=slack / 2)
    # dx is a difference of what gamma / std makes of dy, and may vanish where those do not
    if x.numel():
        parts = (
            weight.abs().double() * moments.inverse_std(form.eps, correction)
        ).max() * dy.abs().max()
        error = np.abs(as_numpy(found.x) - gradients.x).max()
        assert error <= slack / 2 * TOLERANCES[dtype]["value"] * max(float(parts), 1e-3)
    if residual is not None:
        assert_close(found.residual, gradients.residual, dtype, scale=slack / 2)
    # likewise these sums, of terms that may cancel
    xhat = reference.forward(args[0], axis=channel_dim, weights=weights, correction=correction)
    terms = float(dy.abs().double().sum()) * max(1.0, np.abs(xhat).max(initial=0))
    for actual, wanted in ((found.weight, gradients.gamma), (found.bias, gradients.beta)):
        error = np.abs(as_numpy(actual) - wanted).max(initial=0)
        assert error <= slack * TOLERANCES[wide]["sum"] * max(terms, 1e-3)


LARGE = {
    "planar": ((8, 24, 40, 50), [0, 1, 2, 3]),
    "planar, few channels": ((2, 3, 200, 210), [0, 1, 2, 3]),
    "planar, small images": ((20, 200, 5, 7), [0, 1, 2, 3]),
    "interleaved": ((8, 24, 40, 50), [0, 2, 3, 1]),
    "interleaved, few channels": ((2, 3, 200, 210), [0, 2, 3, 1]),
    "interleaved, many channels": ((300, 700), [0, 1]),
}


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_number_of_threads_changes_no_bit(layout, dtype, masked):
    shape, order = LARGE[layout]
    x, dy = random(shape, order, dtype) + 1, random(shape, order, dtype)
    mask = torch.randint(0, 3, [shape[0], 1, *shape[2:]]).float() if masked else None
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y, found, moments = step(x, dy, mask=mask, form=Form(activation=Activation.parse("relu")))
        results.append([y, found.x, found.weight, found.bias, moments.mean, moments.m2])
    for other in results[1:]:
        for first, value in zip(results[0], other, strict=True):
            assert torch.equal(first, value)


@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_y_may_lie_over_x_and_the_residual(layout, dtype, activation, with_residual, instructions):
    shape, order = LARGE[layout]
    if dtype == torch.float32:  # more than the caches hold
        shape = (4 * shape[0], *shape[1:])
    x = random(shape, order, dtype, offset=3)
    form = Form(activation=Activation.parse(activation))
    residual = x if with_residual else None
    expected = NATIVE.forward(x, None, None, residual, None, form, None).y
    assert NATIVE.forward(x, None, None, residual, None, form, None, out=x).y is x
    assert torch.equal(x, expected)


@pytest.fixture
def pretend_cache():
    """Set how much the last cache holds, in bytes; 1 for batches that go past it."""
    yield native._native.pretend_cache
    native._native.pretend_cache(0)


#: Rows of 64, 96 and 512 bytes of a half type, around a tile; runs inside, of, and over a line.
PAST = {
    "rows of one line": ((129, 32), [0, 1]),
    "rows of a line and a half": ((127, 48), [0, 1]),
    "rows of two groups": ((128, 288), [0, 1]),
    "runs of 35 values": ((3, 150, 5, 7), [0, 1, 2, 3]),
    "runs of 255 values": ((2, 20, 15, 17), [0, 1, 2, 3]),
    "runs of 256 values": ((2, 20, 16, 16), [0, 1, 2, 3]),
    "runs of 513 values": ((2, 20, 27, 19), [0, 1, 2, 3]),
    "one channel": ((40, 1, 5, 7), [0, 1, 2, 3]),
}


@pytest.mark.parametrize("shape", [*LARGE, *PAST])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 3])
def test_results_past_the_caches_are_the_same(shape, dtype, offset, instructions, pretend_cache):
    shape, order = {**LARGE, **PAST}[shape]
    x, dy, residual = (random(shape, order, dtype, offset) for _ in range(3))
    form = Form(activation=Activation.parse("relu"))
    results = []
    for bytes_held in (1 << 40, 1):
        pretend_cache(bytes_held)
        y, gradients, _ = step(x, dy, residual=residual, form=form)
        over = residual.clone()
        NATIVE.forward(over, None, None, residual, None, form, None, out=over)
        results.append([y, *gradients, over])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("shape", [(8, 4, 4096), (3, 150, 35)])
def test_values_need_not_begin_where_lines_do(shape, pretend_cache):
    pretend_cache(1)
    size = int(np.prod(shape))
    memory = bytearray(4 * size + 1)
    x = torch.frombuffer(memory, dtype=torch.float32, offset=1, count=size).view(shape)
    x.copy_(torch.randn(shape))
    expected = bn.batch_norm(x.clone(), training=True)
    assert torch.equal(bn.batch_norm(x, training=True, inplace=True), expected)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("layout", LARGE)
def test_float32_is_exact_to_its_last_digits_at_every_mean(layout, mean, instructions):
    shape, order = LARGE[layout]
    x, dy = random(shape, order) + mean, random(shape, order)
    y, found, _ = step(x, dy)
    bound = 3e-7
    expected = reference.forward(as_numpy(x))
    assert np.abs(as_numpy(y) - expected).max() <= bound * np.abs(expected).max()
    gradient = reference.backward(as_numpy(dy), as_numpy(x)).x
    assert np.abs(as_numpy(found.x) - gradient).max() <= bound * np.abs(gradient).max()


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("given", ["x", "weights", "weights and a mask"])
def test_float32_is_as_exact_with_weights(layout, mean, given, instructions):
    shape, order = LARGE[layout]
    deviations = random(shape, order)
    # a dy that has a mean and follows x, so that every term of dx counts
    x, dy = deviations + mean, random(shape, order) + deviations / 2 + 1
    weights = [] if given == "x" else [torch.randn(shape[1]), torch.randn(shape[1])]
    counts = torch.randint(0, 3, [shape[0], *shape[2:]]) if "mask" in given else None
    mask = None if counts is None else counts.unsqueeze(1).float()
    y, found, _ = step(x, dy, mask=mask, **dict(zip(("weight", "bias"), weights, strict=False)))
    args = [as_numpy(v) for v in (x, *weights)]
    expected = reference.forward(*args, weights=counts)
    assert np.abs(as_numpy(y) - expected).max() <= 3e-7 * np.abs(expected).max()
    gradient = reference.backward(as_numpy(dy), *args, weights=counts).x
    assert np.abs(as_numpy(found.x) - gradient).max() <= 5e-7 * np.abs(gradient).max()


def test_layouts_agree():
    shape, order = LARGE["planar"]
    x, dy = random(shape, order) + 1e3, random(shape, order)
    planar = step(x, dy)
    last = torch.channels_last
    others = step(x.contiguous(memory_format=last), dy.contiguous(memory_format=last))
    for a, b in ((planar[0], others[0]), (planar[1].x, others[1].x)):
        assert (a - b).abs().max() <= 3e-7 * a.abs().max()


def test_a_far_off_first_value_costs_no_digits(instructions):
    x = torch.randn(64, 4, 500)
    x[0, :, 0] = 1e4
    found, expected = NATIVE.collect(x, None, Form()), reference.moments(as_numpy(x))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-6)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_goes_where_eager_puts_it(special, order, activation, instructions):
    x, dy = random((6, 5, 7), order), random((6, 5, 7), order)
    x[2, 1, 3] = special
    dy[3, 2, 2] = special
    form = Form(activation=Activation.parse(activation))
    ours, theirs = (step(x, dy, form=form, backend=b) for b in (NATIVE, Eager()))
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    for a, b in ((ours[0], theirs[0]), (ours[1].x, theirs[1].x), (ours[1].bias, theirs[1].bias)):
        assert torch.equal(a.isfinite(), b.isfinite())
        finite = b.isfinite()
        torch.testing.assert_close(a[finite].double(), b[finite].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_are_right_to_the_last_digits(activation, dtype, instructions):
    z = torch.cat([torch.linspace(-110, 110, 40001), torch.logspace(-30, 2, 5001)]).to(dtype)
    specials = [0.0, -3.0, 3.0, 6.0, torch.inf, -torch.inf, torch.nan]
    z = torch.cat([z, -z, torch.tensor(specials, dtype=dtype)])
    parsed = Activation.parse(activation)
    form = Form(eps=0.0, activation=parsed)
    running = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y, _, mean, inverse_std = NATIVE.forward(z[:, None], None, None, None, None, form, running)
    expected = parsed(z.double())
    # these multiply z by what nearly vanishes: there the error is one of z's last digits
    products = activation in ("silu", "gelu", "hardswish")
    slack = z.abs().clamp(max=110) * 0.5 if products else 1e-30
    error = (y[:, 0].double() - expected).abs()
    allowed = torch.finfo(dtype).eps * (2 * expected.abs() + slack)
    tiny = torch.finfo(dtype).tiny
    same = (y[:, 0].double() == expected) | (y[:, 0].isnan() & expected.isnan())
    assert (same | (error <= allowed + tiny)).all()
    g = torch.randn_like(z)
    given = Given(z[:, None], mean, inverse_std, None, None, None, None, form)
    dz = NATIVE.apply_grad(g[:, None], given, None)[0][:, 0].double()
    wanted = parsed.backward(g.double(), z.double())
    bound = torch.finfo(dtype).eps * 8 * (1 + wanted.abs())
    assert (((dz - wanted).abs() <= bound) | (dz.isnan() & wanted.isnan())).all()


def test_an_upstream_gradient_in_any_layout():
    x = torch.randn(6, 5, 7)
    dy = torch.randn(6, 5, 7)
    _, expected, _ = step(x, dy)
    for other in (dy.mT.contiguous().mT, dy.repeat(1, 1, 2)[..., :7]):
        assert torch.equal(step(x, other)[1].x, expected.x)
    constant = torch.ones(()).expand(6, 5, 7)
    torch.testing.assert_close(step(x, constant)[1].x, torch.zeros_like(x), rtol=0, atol=1e-6)


FORK = """
import os, torch, batchnorm as bn
from batchnorm.kernels import native

torch.set_num_threads(1)
def output():
    return bn.batch_norm(torch.randn({shape}), training=True)

held = output()
kept = held.clone()
output()  # its memory waits
child = os.fork()
if child == 0:  # what waited is the parent's
    good = native.release() == 0 and not torch.equal(output(), output())
    os._exit(0 if good and native.release() > 0 else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(held, kept)
assert native.release() > 0
"""


class TestMemory:
    """Large results lie in recycled memory."""

    SHAPE = (40, 8, 64, 65)  # 5 MB

    @pytest.fixture(params=[SHAPE, (5, 8, 64, 65)], ids=["huge pages", "small pages"], autouse=True)
    def _shape(self, request):
        self.shape = request.param
        native.release()

    def output(self):
        return bn.batch_norm(torch.randn(self.shape), training=True)

    def test_a_result_is_an_ordinary_tensor(self):
        y = self.output().requires_grad_()
        assert y.is_leaf
        copied = torch.as_tensor(np.asarray(y.detach()))
        assert torch.equal(copied, y)
        y.detach().add_(1)
        (y * 2).sum().backward()
        assert torch.equal(y.grad, torch.full(self.shape, 2.0))

    def test_what_is_freed_is_used_again_and_what_is_alive_is_not(self):
        native.release()
        first = self.output()
        address, kept = first.data_ptr(), first.clone()
        second = self.output()
        assert second.data_ptr() != address
        assert torch.equal(first, kept)
        view = first[3:]
        del first
        assert self.output().data_ptr() != address  # a view keeps it
        del view, second
        third, fourth = self.output(), self.output()
        assert address in (third.data_ptr(), fourth.data_ptr())

    def test_idle_memory_is_bounded_and_given_back(self):
        native.release()
        limit = native._native.limit_buffers(12 << 20)
        try:
            held = [self.output() for _ in range(4)]
            del held
            assert 0 < native.release() <= 12 << 20
            assert native.release() == 0
            native._native.limit_buffers(0)
            self.output()
            assert native.release() == 0
        finally:
            native._native.limit_buffers(limit)

    def test_a_forked_process_has_memory_of_its_own(self):
        script = FORK.format(shape=self.shape)
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)

    def test_fresh_results_are_poisoned_in_tests(self):
        x = torch.zeros(self.shape)
        assert native.output_like(x, native._seen(x, Form())).isnan().all()


def test_idle_memory_goes_back_by_itself():
    native.release()
    bn.batch_norm(torch.randn(TestMemory.SHAPE), training=True)
    time.sleep(13)
    assert native.release() == 0


def test_kernels_compiled_from_other_sources_are_not_used(tmp_path):
    (tmp_path / "stale.py").write_text("activations = 3\n")
    script = "from batchnorm.kernels import native; print(native.Native().available())"
    env = {**os.environ, "BATCHNORM_NATIVE": "stale", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True
    )
    assert "compiled from other sources" in done.stdout


def test_reasons_are_given_for_what_is_not_taken():
    x = torch.randn(4, 6, 8, 10)
    assert "contiguous" in NATIVE.supports(x[:, :, ::2, ::2], Form())
    assert "meta" in NATIVE.supports(x.to("meta"), Form())
    assert NATIVE.supports(x[:, 2:5], Form()) is None
    assert NATIVE.supports(x[1:3, :, 2:7], Form()) is None


def test_overlapping_values_are_not_taken_for_dense_ones():
    assert is_dense((2, 3), (1, 2))
    assert is_dense((2, 1, 3), (3, 17, 1))
    for shape, strides in (
        ((2, 2, 2), (1, 1, 5)),
        ((2, 3), (4, 1)),
        ((2, 3), (0, 1)),
        ((0,), (1,)),
    ):
        assert not is_dense(shape, strides)


@pytest.mark.parametrize("given", ["abc", "-1", "inf", "0.5"])
def test_a_limit_of_idle_memory_that_cannot_be_is_named(given, monkeypatch):
    monkeypatch.setenv("BATCHNORM_POOL_MB", given)
    with pytest.raises(ValueError, match=f"BATCHNORM_POOL_MB is '{given}': expected a whole"):
        native._pool_bytes()
