"""A plain call does what the long way does, bit for bit, and is only taken where it may be."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ACTIVATIONS, FLOATS, parameter_dtype

import batchnorm as bn
from batchnorm.kernels import native, plain

pytestmark = pytest.mark.skipif(native._native is None, reason="not compiled here")


@pytest.fixture
def taken(monkeypatch):
    """How many calls were plain, and how many were tried."""
    counts = {"plain": 0, "tried": 0}
    forward = plain.forward

    def counted(*arguments):
        found = forward(*arguments)
        counts["tried"] += 1
        counts["plain"] += found is not None
        return found

    monkeypatch.setattr(plain, "forward", counted)
    return counts


def run(x, dy, state, plainly, **arguments):
    """Return y, all gradients and the buffers after a call, made plainly or the long way."""
    state = {name: None if v is None else v.clone() for name, v in state.items()}
    inputs = [x, *(state[name] for name in ("weight", "bias", "residual"))]
    inputs = [None if v is None else v.detach().clone().requires_grad_() for v in inputs]
    inputs[0] = x.detach().requires_grad_()
    x, state["weight"], state["bias"], state["residual"] = inputs
    with pytest.MonkeyPatch.context() as patch:
        if not plainly:
            patch.setattr(plain, "forward", lambda *_: None)
        y = bn.batch_norm(x, **state, **arguments)
    assert isinstance(y.grad_fn.call, plain.Plain) == plainly
    asked = [v for v in inputs if v is not None]
    buffers = [state[k] for k in ("running_mean", "running_var", "num_batches_tracked")]
    return [y, *torch.autograd.grad(y, asked, dy), *(b for b in buffers if b is not None)]


@settings(max_examples=150)
@given(data=st.data())
def test_equals_the_long_way(data):
    draw = lambda strategy, label: data.draw(strategy, label=label)  # noqa: E731
    shape = draw(
        st.sampled_from([(5, 3), (2, 70), (4, 3, 6), (3, 5, 4, 7), (2, 64, 3, 3)]), "shape"
    )
    dtype = draw(st.sampled_from(FLOATS), "dtype")
    x, dy, residual = (torch.randn(shape).to(dtype) for _ in range(3))
    if len(shape) == 4 and draw(st.booleans(), "channels last"):
        x, dy, residual = (v.to(memory_format=torch.channels_last) for v in (x, dy, residual))
    wide, channels, there = parameter_dtype(dtype), shape[1], st.booleans()
    tracks, training = draw(there, "tracks"), draw(there, "training")
    state = {
        "weight": torch.randn(channels, dtype=wide) if draw(there, "weight") else None,
        "bias": torch.randn(channels, dtype=wide) if draw(there, "bias") else None,
        "residual": residual if draw(there, "residual") else None,
        "running_mean": torch.randn(channels) if tracks or not training else None,
        "running_var": torch.rand(channels) + 0.5 if tracks or not training else None,
        "num_batches_tracked": torch.tensor(3) if tracks else None,
    }
    arguments = {
        "training": training,
        "momentum": draw(st.sampled_from([None, 0.1, 1, 0]), "momentum") if tracks else 0.1,
        "correction": draw(st.sampled_from([0, 1]), "correction"),
        "activation": draw(st.sampled_from(ACTIVATIONS), "activation"),
    }
    one, other = (run(x, dy, state, plainly, **arguments) for plainly in (True, False))
    for a, b in zip(one, other, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def channels(**changed):
    given = {"weight": torch.ones(3), "bias": torch.zeros(3), "training": True}
    return {"x": torch.randn(6, 3, 4), **given, **changed}


def buffers(mean=None, var=None):
    mean = torch.zeros(3) if mean is None else mean
    return {"running_mean": mean, "running_var": torch.ones(3) if var is None else var}


class Subclass(torch.Tensor):
    """A tensor that might mean something else."""


ODD = {
    "a residual of another type": channels(residual=torch.randn(6, 3, 4).double()),
    "a residual with other strides": channels(residual=torch.randn(4, 3, 6).mT.mT.permute(2, 1, 0)),
    "a residual whose sign is pending": channels(residual=torch._neg_view(torch.randn(6, 3, 4))),
    "x whose sign is pending": channels(x=torch._neg_view(torch.randn(6, 3, 4))),
    "a weight whose sign is pending": channels(weight=torch._neg_view(torch.ones(3))),
    "a mean whose sign is pending": channels(
        **buffers(torch._neg_view(torch.ones(3))), training=False
    ),
    "x with gaps": channels(x=torch.randn(6, 3, 8)[..., ::2]),
    "weights in four dimensions": channels(weight=torch.ones(1, 3, 1)),
    "strided weights": channels(weight=torch.ones(6)[::2]),
    "another kind of tensor": channels(weight=torch.ones(3).as_subclass(Subclass)),
    "running statistics of two types": channels(**buffers(torch.zeros(3).double())),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_goes_the_long_way(odd, taken):
    arguments = dict(ODD[odd])
    x = arguments.pop("x")
    y = bn.batch_norm(x, **arguments)
    assert taken == {"plain": 0, "tried": 1}
    with bn.backend("eager"):
        torch.testing.assert_close(y, bn.batch_norm(x, **arguments))


ODD_BUFFERS = {
    "half": buffers(torch.zeros(3).half(), torch.ones(3).half()),
    "a counter of floats": {**buffers(), "num_batches_tracked": torch.tensor(0.0)},
    "a counter in a list": {**buffers(), "num_batches_tracked": torch.tensor([0])},
    "a mean with a gradient": buffers(torch.ones(3, requires_grad=True) * 1),
    "a variance with a gradient": buffers(var=torch.ones(3, requires_grad=True) * 1),
}


@pytest.mark.parametrize("odd", ODD_BUFFERS)
def test_odd_buffers_follow_a_plain_call_all_the_same(odd, taken):
    x, state = torch.randn(6, 3, 4), ODD_BUFFERS[odd]
    exact = {name: values.detach().double() for name, values in state.items()}
    bn.batch_norm(x, **state, training=True)
    assert taken == {"plain": 1, "tried": 1}
    bn.batch_norm(x.double(), **exact, training=True)
    for name, values in state.items():
        torch.testing.assert_close(values, exact[name].to(values.dtype))


REFUSED = {
    "eps 0": (channels(eps=0), ValueError, "eps must be positive"),
    "one value": (channels(x=torch.randn(1, 3)), ValueError, "more than 1 value per channel"),
    "no counter": (channels(**buffers(), momentum=None), ValueError, "pass num_batches_tracked"),
    "a number": (channels(residual=1.0), TypeError, "residual is a float"),
    "an array": (channels(residual=np.ones((6, 3, 4))), TypeError, "residual is a ndarray"),
    "half of the statistics": (channels(running_mean=torch.zeros(3)), ValueError, "both be None"),
    "wrong size": (channels(weight=torch.ones(4)), RuntimeError, "3 elements not 4"),
    "no activation": (channels(activation="cube"), ValueError, "activation is 'cube'"),
    "a list": (channels(activation=["relu"]), ValueError, r"activation is \['relu'\]"),
}


@pytest.mark.parametrize("odd", REFUSED)
def test_errors_are_those_of_the_long_way(odd):
    arguments, error, message = REFUSED[odd]
    rest = dict(arguments)
    with pytest.raises(error, match=message):
        bn.batch_norm(rest.pop("x"), **rest)


@pytest.mark.parametrize("training", [1, np.True_, 0, None])
def test_training_is_whatever_is_true(training, taken):
    y = bn.batch_norm(x := torch.randn(6, 3), torch.zeros(3), torch.ones(3), training=training)
    assert taken["plain"] == 1
    expected = torch.nn.functional.batch_norm(
        x, torch.zeros(3), torch.ones(3), training=bool(training)
    )
    torch.testing.assert_close(y, expected)


def test_a_buffer_that_is_also_kept_is_seen_to_change():
    x, mean, shared = torch.randn(8, 3, requires_grad=True), torch.zeros(3), torch.ones(3)
    y = bn.batch_norm(x, mean, shared, shared, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(8, 3))


def test_versions_count_the_updates():
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
    before = [b._version for b in layer.buffers()]
    layer(x)
    assert [b._version for b in layer.buffers()] == [v + 1 for v in before]
    layer.eval()(x)
    assert [b._version for b in layer.buffers()] == [v + 1 for v in before]


def test_a_call_that_fails_updates_nothing():
    layer = bn.BatchNorm1d(3)
    with torch.inference_mode():
        x = torch.randn(8, 3)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_modes_and_transforms_around_the_backward_pass():
    x, dy = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    y = bn.batch_norm(x, training=True)
    (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)

    def scaled(s):
        return (torch.autograd.grad(y, x, dy, retain_graph=True)[0] * s).sum()

    found = torch.func.grad(scaled)(torch.tensor(2.0))
    torch.testing.assert_close(found, expected.sum())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        (fake,) = torch.autograd.grad(y, x, mode.from_tensor(dy))
    assert fake.shape == x.shape


def test_a_tensor_of_a_transform_that_ended():
    escaped = []
    torch.func.grad(lambda w: escaped.append(w) or w.sum())(torch.ones(3))
    x = torch.randn(8, 3, requires_grad=True)
    y = bn.batch_norm(x, weight=escaped[0], training=True)
    torch.testing.assert_close(y, bn.batch_norm(x, training=True))


def test_double_backward_of_a_plain_call(taken):
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, weight, bias):
        return bn.batch_norm(x, weight=weight, bias=bias, training=True, activation="silu")

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))
    assert taken["plain"] == taken["tried"] > 0


def test_nothing_outlives_its_use():
    x = torch.randn(8, 3, requires_grad=True)
    y = bn.batch_norm(x, training=True)
    gone = weakref.ref(y)
    gc.disable()
    try:
        del y
        assert gone() is None
    finally:
        gc.enable()


def test_where_no_memory_can_be_had_torch_says_so(monkeypatch, taken):
    class Full:
        def __getattr__(self, name):
            def refuse(*_):
                raise MemoryError

            return refuse

    x, dy = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    expected = torch.autograd.grad(bn.batch_norm(x, training=True), x, dy)
    settings = True, False, 1, 1e-5, 0, None, None
    _, call = plain.forward(x.detach(), *[None] * 5, *settings)
    call._batch = call._batch._replace(plan=Full())
    assert call.backward(dy, x, None, None, None, (True, False, False, False)) is None
    batch_of = native.batch_of
    monkeypatch.setattr(native, "batch_of", lambda *a: batch_of(*a)._replace(plan=Full()))
    assert plain.forward(x, *[None] * 5, *settings) is None
    monkeypatch.undo()
    assert torch.equal(expected[0], torch.autograd.grad(bn.batch_norm(x, training=True), x, dy)[0])
