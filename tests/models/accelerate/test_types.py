"""Single precision, half types and autocast, by the truth of float64."""

import copy

import pytest
import torch
from models.accelerate.agreement import WAYS, Ways, assert_same, step
from models.accelerate.networks import Network, chained, images
from torch import nn
from torch.nn import functional as F

import batchnorm as bn


def test_single_precision():
    model, inputs = Network(chained), images()
    for save_memory in (False, True):
        expected = step(copy.deepcopy(model), inputs)
        actual = step(bn.accelerate(copy.deepcopy(model), save_memory=save_memory), inputs)
        assert_same(actual, expected, 2e-6)


def smooth(m, x, r):
    """Do what needs no values on one side of 0, where rounding would choose the gradient."""
    y = F.silu(m.norms[0](m.convs[0](x)))
    z = F.gelu(m.norms[1](m.convs[1](y)) + y)
    return F.silu(m.norms[2](m.convs[2](F.mish(z))) + r)


class Autocast(nn.Module):
    """A model under autocast.

    Args:
        run: The model.
    """

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.run(*inputs)


def _half(model, dtype):
    return model.to(dtype)


def _mixed(model, dtype):
    model.to(dtype).norms.float()
    return model


@pytest.mark.parametrize(
    ("around", "made", "dtype"),
    [
        (lambda compiled: lambda model: compiled(model), _half, torch.bfloat16),
        (lambda compiled: lambda model: compiled(model), _half, torch.float16),
        (lambda compiled: lambda model: compiled(model), _mixed, torch.bfloat16),
        (lambda compiled: lambda model: Autocast(compiled(model)), None, torch.bfloat16),
        (lambda compiled: lambda model: compiled(Autocast(model)), None, torch.bfloat16),
    ],
    ids=["bfloat16", "float16", "float32 norms", "autocast around", "autocast inside"],
)
def test_half_types(around, made, dtype):
    """As near to the truth as torch, which rounds between the links of a chain."""
    model, inputs = Network(smooth), images(8, 4, 5, 5)
    truth = step(copy.deepcopy(model).double(), [v.double() for v in inputs])
    if made is not None:
        model, inputs = made(model, dtype), [v.to(dtype) for v in inputs]
    stock = step(around(lambda model: model)(copy.deepcopy(model)), inputs)
    before, ways = copy.deepcopy(model.state_dict()), Ways()
    compiled = around(lambda model: torch.compile(model, backend=ways))(model)
    for ways.way in WAYS:
        model.load_state_dict(before)
        actual = step(compiled, inputs)
        for name, expected in truth.items():
            if expected is None or not expected.is_floating_point():
                continue
            assert actual[name].dtype == stock[name].dtype
            size = expected.abs().max()
            error, theirs = (float((f[name] - expected).abs().max()) for f in (actual, stock))
            assert error <= 2 * theirs + 8 * torch.finfo(dtype).eps * size, name


def test_what_autocast_widens_is_kept():
    """Without it, as in the backward pass, it would not be made again in that type."""

    def function(m, x):
        y = F.relu(m.norms[0](m.convs[0](x)))
        return m.convs[1](F.pad(y, (1,) * 4, mode="reflect")), m.convs[2](F.pad(y, (1,) * 4))

    ways = Ways()
    model, inputs = Network(function), images(n=1)
    compiled, before = torch.compile(model, backend=ways), copy.deepcopy(model.state_dict())
    found = []
    for ways.way in WAYS:
        model.load_state_dict(before)
        found.append(step(Autocast(compiled), inputs))
    assert_same(*found, 0)
