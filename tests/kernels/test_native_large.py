"""Batches of more than 2^31 elements: 20 GB of memory, so only where BATCHNORM_LARGE is set."""

import os

import pytest
import torch

from batchnorm.kernels import Activation, Form, Given, Needs, backends

NATIVE = next(backend for backend in backends() if backend.name == "native")
pytestmark = [
    pytest.mark.skipif(NATIVE.available() is not None, reason="not compiled here"),
    pytest.mark.skipif("BATCHNORM_LARGE" not in os.environ, reason="it takes 20 GB of memory"),
]


@pytest.mark.parametrize("channel_dim", [0, 1])
def test_offsets_are_of_64_bits(channel_dim):
    # a short pattern over and over, whose moments and gradients are known
    repeats, pattern = 2**20 + 1, torch.randn(2, 1024).to(torch.bfloat16)
    if channel_dim == 0:
        x = pattern.repeat(1, repeats)
    else:
        x = pattern.T.contiguous().repeat(repeats, 1)
    assert x.numel() > 2**31
    dy = x.flip(1 - channel_dim)
    small = pattern if channel_dim == 0 else pattern.T.contiguous()
    form = Form(channel_dim, activation=Activation.parse("relu"))
    y, moments, mean, inverse_std = NATIVE.forward(x, None, None, None, None, form, None)
    expected = NATIVE.forward(small, None, None, None, None, form, None)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(inverse_std, expected.inverse_std)
    assert moments.count == x.numel() / 2
    for part in (0, repeats // 2, repeats - 1):
        piece = y.narrow(1 - channel_dim, part * 1024, 1024)
        torch.testing.assert_close(piece, expected.y)
    del y
    found = NATIVE.backward(
        dy, Given(x, mean, inverse_std, None, None, None, None, form), moments.count, Needs()
    )
    given = Given(small, expected.mean, expected.inverse_std, None, None, None, None, form)
    wanted = NATIVE.backward(small.flip(1 - channel_dim), given, 1024.0, Needs())
    torch.testing.assert_close(found.bias / repeats, wanted.bias)
    torch.testing.assert_close(found.weight / repeats, wanted.weight, rtol=1e-5, atol=1e-3)
    for part in (0, repeats - 1):
        piece = found.x.narrow(1 - channel_dim, part * 1024, 1024)
        torch.testing.assert_close(piece, wanted.x)
