"""The layer made of the four steps: a merge between them, and the correction of the moments."""

import numpy as np
import pytest
import torch
from support import (
    FLOATS,
    SERVING,
    Together,
    as_numpy,
    assert_close,
    assert_steps_close,
    expected_step,
    make,
    parameter_dtype,
    weights_of,
)

from batchnorm import Moments, reference
from batchnorm.functional import Renorm
from batchnorm.kernels import DIFFERENTIABLE, Activation, Form, Given, Needs, steps
from batchnorm.kernels.steps import Correction

STEPS = {"differentiable": DIFFERENTIABLE, **SERVING}
RUNNING = torch.tensor([0.0, 2.0, 0.5, -1.0, 0.9]), torch.tensor([4.0, 1.0, 9.0, 4.1, 3.9])


def run(backend, x, weight, bias, residual, dy, mask, form, pool=None, corrects=None):
    """Return y and the four gradients, in the types that a layer gives them."""
    found, correction = steps.forward(
        backend, x, weight, bias, residual, mask, form, pool=pool, corrects=corrects
    )
    given = Given(x, found.mean, found.inverse_std, weight, bias, residual, mask, form)
    of = steps.backward(backend, dy, given, found.moments.count, Needs(), pool, correction)
    channels = (v.to(weight.dtype) for v in (of.weight, of.bias))
    return found.y, of.x, *channels, of.residual.to(x.dtype)


@pytest.mark.parametrize("backend", [*STEPS.values()], ids=[*STEPS])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limits", [None, (1.2, 0.1)])
@pytest.mark.parametrize("sizes", [(4, 5), (8, 1), (0, 9)])
def test_two_parts_with_a_pool_equal_the_whole(backend, dtype, masked, limits, sizes):
    x, weight, bias, residual, dy = make((9, 5, 6), 1, torch.contiguous_format, dtype)
    weights = weights_of(x.shape, 1) if masked else None
    mask = None if weights is None else weights.unsqueeze(1).to(parameter_dtype(dtype))
    form = Form(eps=0.1, activation=Activation.parse("silu"))
    corrects = None if limits is None else Renorm(*RUNNING, *limits, form.eps)
    options = {"eps": form.eps, "weights": weights}
    if limits is not None:
        options |= {"running": [as_numpy(v) for v in RUNNING], "renorm": limits}
    parts = [
        [None if v is None else v[rows] for v in (x, residual, dy, mask)]
        for rows in (slice(0, sizes[0]), slice(sizes[0], 9))
    ]

    def work(rank, pool):
        x, residual, dy, mask = parts[rank]
        return run(backend, x, weight, bias, residual, dy, mask, form, pool, corrects)

    one, other = Together(2).run(work)
    y, dx, dresidual = (torch.cat([one[at], other[at]]) for at in (0, 1, 4))
    dweight, dbias = one[2] + other[2], one[3] + other[3]
    expected = expected_step(x, weight, bias, residual, dy, "silu", **options)
    assert_steps_close((y, dx, dweight, dbias, dresidual), expected, dtype)


@pytest.mark.parametrize("backend", [*STEPS.values()], ids=[*STEPS])
@pytest.mark.parametrize("masked", [False, True])
def test_each_group_is_corrected_by_its_own_moments(backend, masked):
    x, weight, bias, residual, dy = make((7, 5, 6), 1, torch.contiguous_format, torch.float64)
    weights = weights_of(x.shape, 1) if masked else None
    mask = None if weights is None else weights.unsqueeze(1).to(x.dtype)
    form = Form(eps=0.1, correction=1, ghost_size=3)
    corrects = Renorm(*RUNNING, 1.2, 0.1, form.eps)
    found = run(backend, x, weight, bias, residual, dy, mask, form, corrects=corrects)
    expected = expected_step(
        x, weight, bias, residual, dy, eps=form.eps, correction=1, ghost_size=3, weights=weights,
        running=[as_numpy(v) for v in RUNNING], renorm=(1.2, 0.1),
    )  # fmt: skip
    assert_steps_close(found, expected, torch.float64)


@pytest.mark.parametrize("limits", [(1, 0), (1.3, 0.2), (1e3, 1e3)])
def test_the_correction_is_that_of_the_reference(limits):
    moments = Moments.of(torch.randn(8, 5) + 0.5)
    inverse_std, eps = moments.inverse_std(0.1), 0.1
    found = Renorm(*RUNNING, *limits, eps).correction(moments.mean, inverse_std)
    running = as_numpy(RUNNING[0]), 1 / np.sqrt(as_numpy(RUNNING[1]) + eps)
    r, d = reference.renorm(as_numpy(moments.mean), as_numpy(inverse_std), running, limits)
    assert_close(found.r, r, torch.float64)
    assert_close(found.d, d, torch.float64)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_a_correction_in_terms_of_what_normalizes(shape):
    """Each method, by the xhat that it is about."""
    mean, inverse_std, x, g, a, b = torch.randn(6, 11, *shape, dtype=torch.float64)
    mean, inverse_std = mean[0], inverse_std[0].exp()
    correction = Correction(torch.rand(shape, dtype=torch.float64) + 0.5, torch.randn(shape))
    xhat = (x - mean) * inverse_std
    after = correction.r * xhat + correction.d
    near, scale = correction.corrected(mean, inverse_std)
    torch.testing.assert_close((x - near) * scale, after)
    sums = g.sum(0), (g * after).sum(0)
    torch.testing.assert_close(correction.of_xhat(*sums), (g * xhat).sum(0))
    one, other = correction.through(a[0], b[0])
    torch.testing.assert_close(one + other * after, a[0] + b[0] * xhat)


def test_a_batch_without_values_is_not_corrected():
    nothing = Moments.none(5)
    found = Renorm(*RUNNING, 3, 5, 0.1).correction(nothing.mean, nothing.inverse_std(0.1))
    assert (found.r.tolist(), found.d.tolist()) == ([1] * 5, [0] * 5)
    mean, inverse_std = found.corrected(nothing.mean, nothing.inverse_std(0.1))
    assert (mean.tolist(), inverse_std.tolist()) == ([0] * 5, [0] * 5)


def test_nothing_is_exchanged_for_gradients_that_nobody_wants():
    class Silent:
        def sums(self, *_):
            raise AssertionError("an exchange")

    x, mean, dy = torch.randn(4, 3), torch.zeros(3), torch.randn(4, 3)
    given = Given(x, mean, torch.ones(3), None, None, None, None, Form())
    for needs in (Needs(x=False), Needs(x=False, weight=False, bias=False)):
        steps.backward(DIFFERENTIABLE, dy, given, 4, needs, Silent())
    found = steps.backward(DIFFERENTIABLE, dy, given, None, Needs(), Silent())
    torch.testing.assert_close(found.x, dy)  # the moments do not depend on x
