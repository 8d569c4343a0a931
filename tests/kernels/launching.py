"""What the tests of the programs for a GPU share: a whole step on them, wherever they run."""

import numpy as np
import pytest
import torch

from batchnorm.kernels import Form, Given, Needs, backends
from batchnorm.kernels.triton import device

TRITON = next(backend for backend in backends() if backend.name == "triton")
#: For the files of these tests.
WHERE_IT_RUNS = pytest.mark.skipif(TRITON.available() is not None, reason=str(TRITON.available()))


def step(x, dy, *, weight=None, bias=None, residual=None, mask=None, form=None, backend=TRITON):
    """Return y, the gradients and the moments, by the two fused calls."""
    form = form or Form()
    y, moments, mean, inverse_std = backend.forward(x, weight, bias, residual, mask, form, None)
    given = Given(x, mean, inverse_std, weight, bias, residual, mask, form)
    return y, backend.backward(dy, given, moments.count, Needs()), moments


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


def random(shape, order, dtype=torch.float32, offset=0):
    """Return random values whose dimensions lie in memory in some order, at some offset."""
    flat = torch.randn(int(np.prod(shape)) + offset).to(dtype)[offset:]
    return flat.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
