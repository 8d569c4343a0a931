"""Every backend's four steps, one by one, held to the reference."""

import pytest
import torch
from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    SERVING,
    as_numpy,
    assert_close,
    assert_steps_close,
    expected_step,
    ghost_sizes,
    make,
    named,
    parameter_dtype,
    weights_of,
)

from batchnorm import reference
from batchnorm.kernels import DIFFERENTIABLE, Activation, Form, Given, Needs
from batchnorm.moments import divide

BACKENDS = {"differentiable": DIFFERENTIABLE, **SERVING}


@pytest.mark.parametrize("backend", [*BACKENDS.values()], ids=[*BACKENDS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("masked", [False, True])
def test_each_step_equals_the_reference(backend, activation, dtype, masked):
    x, residual, dy = (torch.randn(9, 4, 11).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(4, dtype=parameter_dtype(dtype)) for _ in range(2))
    mask = torch.randint(0, 3, (9, 1, 11)).to(weight.dtype) if masked else None
    form = Form(activation=Activation.parse(activation))
    weights = None if mask is None else as_numpy(mask)[:, 0]
    expected = reference.moments(as_numpy(x), weights=weights)
    options = {"weights": weights, "residual": as_numpy(residual), **named(activation)}
    arguments = [as_numpy(v) for v in (x, weight, bias)]
    gradients = reference.backward(as_numpy(dy), *arguments, **options)
    wide = parameter_dtype(dtype)

    moments = backend.collect(x, mask, form)
    assert float(moments.count) == expected.count
    assert_close(moments.mean, expected.mean, wide)
    assert_close(moments.m2, expected.m2, wide, "sum")

    given = Given(
        x, moments.mean, moments.inverse_std(form.eps), weight, bias, residual, mask, form
    )
    y = backend.normalize(given)
    assert y.dtype == dtype
    assert_close(y, reference.forward(*arguments, **options), dtype)

    sum_g, sum_g_xhat = backend.reduce_grad(dy, given)
    assert_close(sum_g, gradients.beta, wide, "sum", scale=10)
    assert_close(sum_g_xhat, gradients.gamma, wide, "sum", scale=10)

    through = sum_g / moments.count, sum_g_xhat / moments.count
    dx, dresidual = backend.apply_grad(dy, given, through)
    assert_close(dx, gradients.x, dtype)
    assert_close(dresidual.to(dtype), gradients.residual, dtype)

    running = as_numpy(moments.mean), as_numpy(moments.var())
    fixed = reference.backward(as_numpy(dy), *arguments, running=running, **options)
    assert_close(backend.apply_grad(dy, given, None)[0], fixed.x, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS.values()], ids=[*BACKENDS])
def test_no_step_changes_what_it_is_given(backend):
    x, dy, residual = (torch.randn(5, 3) for _ in range(3))
    before = [t.clone() for t in (x, dy, residual)]
    form = Form(activation=Activation.parse("relu"))
    with torch.no_grad():
        moments = backend.collect(x, None, form)
        inverse_std = moments.inverse_std(form.eps)
        given = Given(x, moments.mean, inverse_std, None, None, residual, None, form)
        backend.normalize(given)
        backend.reduce_grad(dy, given)
        backend.apply_grad(dy, given, (moments.mean, moments.mean))
    for now, then in zip((x, dy, residual), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("backend", [*BACKENDS.values()], ids=[*BACKENDS])
@pytest.mark.parametrize("by_batch", [True, False])
def test_y_goes_where_it_is_asked_for(backend, by_batch):
    x, residual = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    form = Form(activation=Activation.parse("gelu"))
    running = None if by_batch else (torch.randn(4), torch.rand(4))
    expected = backend.forward(x, None, None, residual, None, form, running)
    given = Given(x, expected.mean, expected.inverse_std, None, None, residual, None, form)
    assert torch.equal(backend.normalize(given), expected.y)
    for out_of in (
        torch.empty_like,
        lambda x: x,
        lambda x: torch.empty(5, 4, 6).mT.mT.permute(2, 1, 0),
    ):
        for whole in (True, False):
            mine = x.clone()
            out = out_of(mine)
            version = out._version
            if whole:
                y = backend.forward(mine, None, None, residual, None, form, running, out).y
            else:
                y = backend.normalize(given._replace(x=mine), out)
            assert y is out
            assert out._version > version
            assert torch.equal(y, expected.y)


def grouping(backend, layout):
    """Return the sizes of groups that a backend takes in a layout."""
    shape, channel_dim, order = LAYOUTS[layout]
    x = torch.empty(shape).contiguous(memory_format=order)
    sizes = ghost_sizes(layout)
    return [n for n in sizes if not backend.supports(x, Form(channel_dim, ghost_size=n))]


def test_native_takes_groups_wherever_the_examples_are_outermost():
    if "native" in BACKENDS:
        taken = {layout for layout in LAYOUTS if grouping(BACKENDS["native"], layout)}
        assert taken == LAYOUTS.keys() - {"channels in front"}


@pytest.mark.parametrize("backend", [*BACKENDS.values()], ids=[*BACKENDS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("masked", [False, True])
def test_each_step_and_both_calls_on_groups_equal_the_reference(backend, layout, dtype, masked):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    x, weight, bias, residual, dy = make(shape, channel_dim, memory_format, dtype)
    weights = weights_of(shape, channel_dim) if masked else None
    options = {"axis": channel_dim, "weights": weights}
    mask = None if weights is None else weights.unsqueeze(channel_dim).to(weight.dtype)
    for size in grouping(backend, layout):
        form = Form(channel_dim, activation=Activation.parse("gelu"), ghost_size=size)
        expected = expected_step(x, weight, bias, residual, dy, "gelu", ghost_size=size, **options)
        rows = len(reference.groups(shape, channel_dim, size))

        moments = backend.collect(x, mask, form)
        inverse_std = moments.inverse_std(form.eps)
        assert moments.mean.shape == moments.m2.shape == inverse_std.shape == (rows, 5)
        assert moments.count.shape == (rows, 1)
        given = Given(x, moments.mean, inverse_std, weight, bias, residual, mask, form)
        y = backend.normalize(given)
        sums = backend.reduce_grad(dy, given)
        assert sums[0].shape == sums[1].shape == (rows, 5)
        through = divide(sums[0], moments.count), divide(sums[1], moments.count)
        dx, dresidual = backend.apply_grad(dy, given, through)
        channels = [v.sum(0).to(weight.dtype) for v in (sums[1], sums[0])]
        assert_steps_close((y, dx, *channels, dresidual.to(dtype)), expected, dtype)

        found = backend.forward(x, weight, bias, residual, mask, form, None)
        assert torch.equal(found.moments.count, moments.count)
        torch.testing.assert_close(found.moments.mean, moments.mean)
        torch.testing.assert_close(found.moments.m2, moments.m2)
        given = given._replace(mean=found.mean, inverse_std=found.inverse_std)
        of = backend.backward(dy, given, found.moments.count, Needs())
        channels = [v.to(weight.dtype) for v in (of.weight, of.bias)]
        assert_steps_close((found.y, of.x, *channels, of.residual.to(dtype)), expected, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS.values()], ids=[*BACKENDS])
def test_running_statistics_are_those_of_all_groups(backend):
    x, dy = torch.randn(9, 4, 5), torch.randn(9, 4, 5)
    running = torch.randn(4), torch.rand(4) + 0.5
    found = []
    for size in (None, 2):
        form = Form(activation=Activation.parse("relu"), ghost_size=size)
        of = backend.forward(x, None, None, None, None, form, running)
        given = Given(x, of.mean, of.inverse_std, None, None, None, None, form)
        gradients = backend.backward(dy, given, None, Needs())
        found.append((of.y, backend.normalize(given), *gradients[:3]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
