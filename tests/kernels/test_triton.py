"""What is particular to the programs for a GPU: how batches are cut, who merges, what is kept.

Without a GPU, Triton's interpreter runs them on the CPU.
"""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    TOLERANCES,
    as_numpy,
    assert_close,
    assert_steps_close,
    expected_step,
    make,
    named,
    parameter_dtype,
    weights_of,
)

import batchnorm as bn
from batchnorm import Moments, reference
from batchnorm.functional.running import update_running
from batchnorm.kernels import Activation, Form, Given, Needs, backends, triton
from batchnorm.kernels.eager import Eager
from batchnorm.kernels.triton import backend as module
from batchnorm.kernels.triton import device, launches, plan, tuning
from batchnorm.kernels.triton.plan import Cut

TRITON = next(backend for backend in backends() if backend.name == "triton")
pytestmark = pytest.mark.skipif(TRITON.available() is not None, reason=str(TRITON.available()))

#: Every way to cut a batch: as is reckoned; tile by tile; held by one program, or by several.
CUTS = ("reckoned", "streaming", "held", "together")


def step(x, dy, *, weight=None, bias=None, residual=None, mask=None, form=None, backend=TRITON):
    """Return y, the gradients and the moments, by the two fused calls."""
    form = form or Form()
    y, moments, mean, inverse_std = backend.forward(x, weight, bias, residual, mask, form, None)
    given = Given(x, mean, inverse_std, weight, bias, residual, mask, form)
    return y, backend.backward(dy, given, moments.count, Needs()), moments


@pytest.fixture
def cut(monkeypatch):
    """Choose how batches are cut."""

    def choose(kind):
        if kind == "reckoned":
            return

        def chosen(batch, x, work="", run=None):
            size = x.element_size()
            if kind == "streaming" or not work:
                return plan.reckoned(batch, size, 2, 0)
            if kind == "held":
                return plan.reckoned(batch, size, 2, 1 << 20)
            columns = plan._power(batch.width)
            columns = columns if batch.view.planar else min(columns, 4)
            rows = max(1, plan._power(batch.most) // 4)
            return Cut(rows, columns, -(-batch.most // rows), 4, held=True)

        monkeypatch.setattr(module, "cut_of", chosen)
        if kind == "together" and device.is_interpreted():
            monkeypatch.setattr(launches, "start", twice)

    return choose


def twice(program, number, beside, **given):
    """Run a program that waits for others twice: one at a time, they find all parts then.

    The interpreter runs one program to its end before it begins the next.
    """
    held = device.programs()[1]
    waits = given.get("PROGRAMS", 1) > 1
    meet = held.meet
    try:
        if waits:
            held.meet = lambda *_: None
            device.start(program, number, beside, **given)
        device.start(program, number, beside, **given)
    finally:
        held.meet = meet


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("reckoned", dtype) for dtype in FLOATS]
    + [(kind, dtype) for kind in CUTS[1:] for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["plain", "masked", "groups"])
def test_every_cut_equals_the_reference(kind, layout, dtype, variant, cut):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    if variant == "groups" and layout == "channels in front":
        pytest.skip("the examples are not outermost")
    cut(kind)
    x, weight, bias, residual, dy = make(shape, channel_dim, memory_format, dtype)
    weights = weights_of(shape, channel_dim) if variant != "plain" else None
    mask = None if weights is None else weights.unsqueeze(channel_dim).to(weight.dtype)
    size = 3 if variant == "groups" else None
    form = Form(channel_dim, activation=Activation.parse("silu"), ghost_size=size)
    expected = expected_step(
        x, weight, bias, residual, dy, "silu", axis=channel_dim, weights=weights, ghost_size=size
    )
    y, of, _ = step(x, dy, weight=weight, bias=bias, residual=residual, mask=mask, form=form)
    channels = [v.to(weight.dtype) for v in (of.weight, of.bias)]
    assert_steps_close((y, of.x, *channels, of.residual.to(dtype)), expected, dtype)


def random(shape, order, dtype=torch.float32, offset=0):
    """Return random values whose dimensions lie in memory in some order, at some offset."""
    flat = torch.randn(int(np.prod(shape)) + offset).to(dtype)[offset:]
    return flat.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_drawn_batches_equal_the_reference(data):
    sizes = st.sampled_from([0, 1, 1, 2, 3, 5, 8, 17, 33])
    shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=4), label="shape"))
    channel_dim = data.draw(st.integers(0, len(shape) - 1), label="channel_dim")
    order = data.draw(st.permutations(range(len(shape))), label="order")
    dtype = data.draw(st.sampled_from(FLOATS), label="dtype")
    activation = data.draw(st.sampled_from(ACTIVATIONS), label="activation")
    offset = data.draw(st.integers(0, 3), label="offset")
    correction = data.draw(st.sampled_from([0, 1]), label="correction")
    wide = parameter_dtype(dtype)
    x, dy, residual = (random(shape, list(order), dtype, offset) for _ in range(3))
    x = (x * 2 + 10.0 ** data.draw(st.integers(-2, 1), label="mean")).to(dtype)
    if data.draw(st.booleans(), label="strided"):
        d = data.draw(st.integers(0, len(shape) - 1), label="in dimension")
        x, dy, residual = (v.narrow(d, 0, shape[d] // 2) for v in (x, dy, residual))
    channels = x.shape[channel_dim]
    form = Form(channel_dim, 0.1, correction, Activation.parse(activation))
    assume(TRITON.supports(x, form) is None)
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
        "eps": 0.1,
        "weights": None if weights is None else as_numpy(weights),
        "correction": correction,
        "residual": None if residual is None else as_numpy(residual),
        **named(activation),
    }
    args = [as_numpy(v) for v in (x, weight, bias)]
    gradients = reference.backward(as_numpy(dy), *args, **options)
    expected = reference.moments(args[0], channel_dim, options["weights"])
    if channels:
        assert float(moments.count) == expected.count
    assert (moments.m2 >= 0).all()
    assert_close(y, reference.forward(*args, **options), dtype)
    if x.numel():
        inverse = moments.inverse_std(form.eps, correction)
        # dx is a difference of what gamma / std makes of dy, and may vanish where those do not
        parts = float((weight.abs().double() * inverse).max() * dy.abs().max())
        error = np.abs(as_numpy(found.x) - gradients.x).max()
        largest = max(parts, np.abs(gradients.x).max(), 1e-3)
        assert error <= TOLERANCES[dtype]["value"] * largest
    if residual is not None:
        assert_close(found.residual, gradients.residual, dtype)
    terms = float(dy.abs().double().sum()) * 30
    for actual, wanted in ((found.weight, gradients.gamma), (found.bias, gradients.beta)):
        error = np.abs(as_numpy(actual) - wanted).max(initial=0)
        assert error <= TOLERANCES[wide]["sum"] * max(terms, 1e-3)


LARGE = {
    "planar": ((6, 5, 40, 50), [0, 1, 2, 3]),
    "planar, small images": ((40, 9, 5, 7), [0, 1, 2, 3]),
    "interleaved": ((6, 5, 40, 50), [0, 2, 3, 1]),
    "interleaved, many channels": ((500, 70), [0, 1]),
}


@pytest.mark.parametrize("kind", ["streaming", "together"])
@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("masked", [False, True])
def test_who_arrives_last_changes_no_bit(layout, masked, kind, cut, monkeypatch):
    if not device.is_interpreted():
        pytest.skip("a GPU runs programs in an order of its own")
    from triton.runtime import interpreter

    cut(kind)
    shape, order = LARGE[layout]
    x, dy = random(shape, order) + 1, random(shape, order)
    mask = torch.randint(0, 3, [shape[0], 1, *shape[2:]]).float() if masked else None
    results = []
    for turned in (False, True):
        if turned:  # the programs run in the other order
            monkeypatch.setattr(
                interpreter, "range", lambda *n: [*builtins.range(*n)][::-1], raising=False
            )
        y, found, moments = step(x, dy, mask=mask, form=Form(activation=Activation.parse("relu")))
        results.append([y, found.x, found.weight, found.bias, moments.mean, moments.m2])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e6])
@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("kind", ["streaming", "held", "together"])
def test_float32_is_exact_to_its_last_digits_at_every_mean(layout, mean, kind, cut):
    cut(kind)
    shape, order = LARGE[layout]
    if kind != "streaming" and order == [0, 2, 3, 1]:
        pytest.skip("no program holds as much")
    # the interpreter sums the rows of a tile one by one, and a GPU in pairs
    bound = 5e-7 if kind == "streaming" else 1e-6
    deviations = random(shape, order)
    # a dy that has a mean and follows x, so that every term of dx counts
    x, dy = deviations + mean, random(shape, order) + deviations / 2 + 1
    y, found, _ = step(x, dy)
    expected = reference.forward(as_numpy(x))
    assert np.abs(as_numpy(y) - expected).max() <= bound * np.abs(expected).max()
    gradient = reference.backward(as_numpy(dy), as_numpy(x)).x
    assert np.abs(as_numpy(found.x) - gradient).max() <= bound * np.abs(gradient).max()


def test_a_far_off_first_value_costs_no_digits():
    x = torch.randn(64, 4, 100)
    x[0, :, 0] = 1e4
    found, expected = TRITON.collect(x, None, Form()), reference.moments(as_numpy(x))
    np.testing.assert_allclose(as_numpy(found.mean), expected.mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(as_numpy(found.m2), expected.m2, rtol=1e-6)


def test_padding_in_front_costs_no_digits():
    """Whole programs see nothing that counts, and a NaN where nothing does."""
    x = torch.randn(400, 4, 40) + 1e6
    mask = torch.ones(400, 1, 40)
    mask[:300] = 0
    x[:300] = torch.nan
    found, expected = TRITON.collect(x, mask, Form()), reference.moments(as_numpy(x[300:]))
    assert float(found.count) == expected.count
    np.testing.assert_allclose(as_numpy(found.mean), expected.mean, rtol=1e-12)
    np.testing.assert_allclose(as_numpy(found.m2), expected.m2, rtol=1e-6)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["streaming", "held"])
def test_what_is_not_finite_goes_where_eager_puts_it(special, order, activation, kind, cut):
    cut(kind)
    x, dy = random((6, 5, 7), order), random((6, 5, 7), order)
    x[2, 1, 3] = special
    dy[3, 2, 2] = special
    form = Form(activation=Activation.parse(activation))
    ours, theirs = (step(x, dy, form=form, backend=b) for b in (TRITON, Eager()))
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    for a, b in ((ours[0], theirs[0]), (ours[1].x, theirs[1].x), (ours[1].bias, theirs[1].bias)):
        assert torch.equal(a.isfinite(), b.isfinite())
        finite = b.isfinite()
        torch.testing.assert_close(a[finite].double(), b[finite].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_functions_are_right_to_the_last_digits(activation):
    z = torch.cat([torch.linspace(-110, 110, 4001), torch.logspace(-30, 2, 501)])
    z = torch.cat([z, -z, torch.tensor([0.0, -3.0, 3.0, 6.0, torch.inf, -torch.inf, torch.nan])])
    parsed = Activation.parse(activation)
    form = Form(eps=0.0, activation=parsed)
    running = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y, _, mean, inverse_std = TRITON.forward(z[:, None], None, None, None, None, form, running)
    expected = parsed(z.double())
    same = (y[:, 0].double() == expected) | (y[:, 0].isnan() & expected.isnan())
    # these multiply z by what nearly vanishes: there the error is one of z's last digits
    products = activation in ("silu", "gelu", "hardswish")
    slack = z.abs().clamp(max=110) * 0.5 if products else 1e-30
    bound = torch.finfo(z.dtype).eps * (4 * expected.abs() + slack) + torch.finfo(z.dtype).tiny
    assert (same | ((y[:, 0].double() - expected).abs() <= bound)).all()
    g = torch.randn_like(z)
    given = Given(z[:, None], mean, inverse_std, None, None, None, None, form)
    dz = TRITON.apply_grad(g[:, None], given, None)[0][:, 0].double()
    wanted = parsed.backward(g.double(), z.double())
    bound = torch.finfo(z.dtype).eps * 8 * (1 + wanted.abs())
    assert (((dz - wanted).abs() <= bound) | (dz.isnan() & wanted.isnan())).all()


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_far_places_are_found_by_64_bits(order, monkeypatch):
    x, dy, mask = random((6, 5, 7), order), random((6, 5, 7), order), torch.ones(6, 1, 7)
    near = step(x, dy, mask=mask)
    monkeypatch.setattr(launches, "is_far", lambda *_: True)
    far = step(x, dy, mask=mask)
    assert torch.equal(near[0], far[0])
    assert torch.equal(near[1].x, far[1].x)


def test_steps_over_31_bits_reach_as_far(monkeypatch):
    """A step is given divided by 8, and fits in 31 bits then; its multiples do not."""
    from kernels.pieces import offset_of

    launch = offset_of[(1,)]
    for planar in (False, True):
        found = torch.zeros(1, dtype=torch.int64)
        with device._on(found):
            launch(found, 3, 2**28, 2**29, 5, PLANAR=planar, FAR=True, ALIGN=8)
        assert int(found) == 3 * 2**31 + (5 * 2**32 if planar else 5)


def test_the_last_to_arrive_waits_for_nobody():
    from kernels.pieces import arrive

    there = torch.full((1,), 3, dtype=torch.int32)
    with device._on(there):
        arrive[(1,)](there, PROGRAMS=4)
    assert int(there) == 4


def test_more_groups_than_can_be_counted_are_refused():
    x = torch.empty(2**20, 4096, device="meta")
    batch = [plan.batch_of(tuple(x.shape), x.stride(), 1, size) for size in (None, 2, 2**12)]
    assert [found is None for found in batch] == [False, True, False]


def test_what_was_tuned_for_another_gpu_is_not_used(cache, monkeypatch):
    x = torch.randn(40, 6, 9)
    batch = launches.seen(x, Form())
    own = launches.cut_of(batch, x, "forward")
    for wrong in (Cut(16, 16, 64, 1, True), Cut(3, 16, 1, 1), Cut(8, 16, 1, 1, True)):
        monkeypatch.setattr(tuning, "kept", lambda *_, wrong=wrong: wrong)
        assert launches.cut_of(batch, x, "forward") == own


def test_what_reaches_over_31_bits_is_far():
    near, far = (torch.empty(n, 2, device="meta") for n in (2**29, 2**30))
    assert [plan.is_far(near, None), plan.is_far(near, far)] == [False, True]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", FLOATS)
def test_running_statistics_follow(masked, momentum, dtype):
    x = torch.randn(9, 5, 6)
    mask = torch.randint(0, 3, (9, 1, 6)).float() if masked else None
    moments = TRITON.collect(x, mask, Form())
    mine, theirs = ([torch.randn(5).to(dtype), torch.rand(5).to(dtype)] for _ in range(2))
    for one, other in zip(mine, theirs, strict=True):
        one.copy_(other)
    tracked = [torch.tensor(3), torch.tensor(3)]
    triton.running.move(*mine, moments, momentum, tracked[0])
    update_running(*theirs, moments, momentum, tracked[1])
    assert tracked[0] == tracked[1] == 4
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("moments", ["one value", "not finite", "too large"])
def test_running_statistics_follow_nothing_that_is_wrong(moments):
    wide = torch.ones(2000, dtype=torch.float64)
    wrong = wide.clone()
    wrong[1777] = {"one value": 1, "not finite": torch.nan, "too large": 1e300}[moments]
    running, tracked = [torch.zeros(2000), torch.ones(2000)], torch.tensor(3)
    count = 1 if moments == "one value" else 10
    triton.running.move(*running, Moments(count, wrong, wide), 0.1, tracked)
    assert (tracked, running[0].any(), (running[1] == 1).all()) == (3, False, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_cut_covers_the_batch_and_can_be_launched(layout, size):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    for scale in (1, 8, 300):
        shape_ = (shape[0] * scale, *shape[1:])
        strides = torch.empty(shape_, device="meta").to(memory_format=memory_format).stride()
        batch = plan.batch_of(shape_, strides, channel_dim, None)
        own = [plan.reckoned(batch, size, 132, held) for held in (0, plan.HELD)]
        for cut in [*own, *plan.candidates(batch, size, 132, plan.HELD)]:
            for n in (cut.rows, cut.columns, cut.warps):
                assert n >= 1
                assert n & (n - 1) == 0
            assert cut.rows * cut.columns >= 32 * cut.warps or cut.warps == 1
            if cut.held:
                assert cut.rows * cut.programs >= batch.most
                assert cut.columns >= batch.width or not batch.view.planar
                assert cut.programs <= 132


def test_bytes_are_loaded_sixteen_at_a_time_where_they_can_be():
    assert [plan.alignment(64, 3136), plan.alignment(196, 12), plan.alignment(49, 49)] == [8, 4, 1]
    assert plan.alignment(0, 64) == 8  # a step of nothing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def test_what_was_tuned_is_kept_and_used(cache, monkeypatch):
    x, dy = torch.randn(40, 6, 9), torch.randn(40, 6, 9)
    before = step(x, dy)
    assert not cache.exists()  # nothing is tuned that nobody asked for
    monkeypatch.setenv("BATCHNORM_TUNE", "1")
    monkeypatch.setattr(launches, "start", twice if device.is_interpreted() else device.start)
    tuned = step(x, dy)
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert sorted(key.split(",")[0] for key in kept) == ["backward", "forward"]
    other = [1, 16, 6, 1, False]
    file.write_text(json.dumps(dict.fromkeys(kept, other)))
    tuning.forget()
    monkeypatch.delenv("BATCHNORM_TUNE")
    batch = launches.seen(x, Form())
    assert launches.cut_of(batch, x, "forward") == Cut(*other)
    again = step(x, dy)
    for one, two, three in zip(before[:1], tuned[:1], again[:1], strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": [1, 2]}', '{"key": ["a", 1, 1, 1, 0]}'])
def test_a_file_that_cannot_be_read_is_as_good_as_none(text, cache, monkeypatch):
    x = torch.randn(40, 6, 9)
    cache.mkdir()
    tuning._file(x.device).write_text(text)
    assert TRITON.forward(x, None, None, None, None, Form(), None).y.isfinite().all()


def test_a_candidate_that_does_not_run_is_passed_over(cache):
    good, bad = Cut(16, 16, 1, 1), Cut(16, 16, 2, 1)

    def run(cut):
        if cut == bad:
            raise RuntimeError("out of resources")

    assert tuning.fastest("key", torch.device("cpu"), [good, bad], run) == good
    with pytest.raises(RuntimeError, match="out of resources"):
        tuning.fastest("other", torch.device("cpu"), [bad, good], run)


def test_says_why_it_cannot_serve(monkeypatch):
    x = torch.zeros(4, 3)
    assert "does not take torch.int32" in TRITON.supports(x.int(), Form())
    strided = torch.zeros(4, 6, 8, 9)[:, ::2, ::2, ::3]
    assert "contiguous" in TRITON.supports(strided, Form())
    front = torch.zeros(3, 8, 5).transpose(0, 1)
    assert "outermost" in TRITON.supports(front, Form(ghost_size=2))
    assert "meta" in TRITON.supports(x.to("meta"), Form())
    monkeypatch.setattr(device, "is_interpreted", lambda: False)
    missing = device.missing.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in missing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    device.refusal.cache_clear()
    assert missing() == "Old GPU has compute capability 7.5, and Triton needs 8.0 or more"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = type("Properties", (), {"gcnArchName": "gfx1100"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device.refusal.cache_clear()
    assert missing() == "Old GPU is gfx1100, and gfx9 is needed"
    device.refusal.cache_clear()
    monkeypatch.setattr(device, "VERSION", (99, 0))
    assert "99.0 is needed" in missing()
    monkeypatch.setattr(device, "import_module", lambda _: 1 / 0)
    assert missing() == "Triton cannot be imported: division by zero"
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    assert "Triton is not installed" in missing()


def test_without_triton_the_package_is_whole():
    program = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.modules["triton"] = None
import batchnorm as bn, torch
from batchnorm.kernels.triton import device
assert bn.BatchNorm(3)(torch.randn(4, 3)).shape == (4, 3)
from batchnorm.cli import main
sys.argv = ["batchnorm", "env"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "triton: Triton is not installed" in done.stdout or "triton: there is no GPU" in (
        done.stdout
    )


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_every_program_compiles_ahead_of_time(target):
    """Of a thread's registers none is spilled in the loops that count; loads are 16 bytes wide."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead.py"), target],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["program"] for row in rows} == {
        "collect", "normalize", "reduce_grad", "apply_grad", "forward", "backward", "follow",
    }  # fmt: skip
    if target.startswith("cuda"):
        for row in rows:
            assert row["registers"] <= device.REGISTERS
            assert row["spilled"] <= 512
            assert row["shared"] <= 99 * 1024  # what the smallest GPUs give a program
            if row["case"] in ("planar, bf16", "interleaved, bf16"):
                assert row["program"] == "follow" or row["ahead"] == [16]
            if row["case"] == "held, interleaved, bf16":
                assert row["program"] == "follow" or {"4x32", 16} & {*row["loads"], *row["ahead"]}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_compiled_layer_runs_on_it(layout):
    shape, _, memory_format = LAYOUTS[layout]
    layer = bn.BatchNorm2d(shape[1], activation="relu")
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    layer.reset_running_stats()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with bn.backend("triton"):
        found = torch.autograd.grad(compiled(x), [x, *layer.parameters()], dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiler_does_not_look_into_what_can_run():
    def chosen(x):
        return x + 1 if device.can_run() else x

    found = torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(2))
    assert found.tolist() == [1, 1]
    assert not triton.takes(torch.zeros(2, device="cpu"))  # the interpreter is no GPU
