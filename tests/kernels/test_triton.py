"""The programs for a GPU, held to the reference: however a batch is cut, and whoever merges.

Without a GPU, Triton's interpreter runs them on the CPU.
"""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernels.launching import TRITON, WHERE_IT_RUNS, random, step, twice
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

from batchnorm import Moments, reference
from batchnorm.functional.running import update_running
from batchnorm.kernels import Activation, Form, Given, triton
from batchnorm.kernels.eager import Eager
from batchnorm.kernels.triton import backend as module
from batchnorm.kernels.triton import device, launches, plan
from batchnorm.kernels.triton.plan import Cut

pytestmark = WHERE_IT_RUNS

#: Every way to cut a batch: as is reckoned; tile by tile; held by one program, or by several.
CUTS = ("reckoned", "streaming", "held", "together")


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


@pytest.mark.parametrize("mean", [1e6, -1e6])
def test_padding_in_front_costs_no_digits(mean):
    """Whole programs see nothing that counts, and a NaN where nothing does."""
    x = torch.randn(400, 4, 40) + mean
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


def test_steps_over_31_bits_reach_as_far():
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


def test_running_statistics_of_another_size_are_left_alone(monkeypatch):
    monkeypatch.setattr(triton.running, "takes", lambda _: True)
    moments = TRITON.collect(torch.randn(9, 4), None, Form())
    kept = torch.zeros(6)
    for mean, var, tracked in (
        (kept[:2], kept[2:4], None),
        (kept[:4], kept[:4], torch.zeros(2, dtype=torch.int64)),
    ):
        assert not triton.follow(mean, var, moments, 0.1, tracked)
    assert not kept.any()
