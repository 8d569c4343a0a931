"""What follows a batch norm, however it is written: what runs fused, and that nothing changes."""

import operator

import pytest
import torch
from models.accelerate.agreement import assert_agrees
from models.accelerate.networks import Network, Table, images
from torch import nn
from torch.nn import functional as F

from batchnorm.kernels.activations import NAMES

SHAPE = "it is added to a tensor of another shape"
ALPHA = "the sum has an alpha or an out"

#: name -> what is added to a batch norm, and how: as what it runs, or why not.
SUMS = {
    "+": (lambda n, x, r: n(x) + r, "add"),
    "+ reversed": (lambda n, x, r: r + n(x), "add"),
    "+=": (lambda n, x, r: operator.iadd(n(x), r), "add"),
    "torch.add": (lambda n, x, r: torch.add(n(x), r), "add"),
    "torch.add by name": (lambda n, x, r: torch.add(input=r, other=n(x)), "add"),
    "add": (lambda n, x, r: n(x).add(r), "add"),
    "add_": (lambda n, x, r: n(x).add_(r), "add"),
    "its input": (lambda n, x, r: n(x) + x, "add"),
    "a constant residual": (lambda n, x, r: n(x) + r.detach(), "add"),
    "expanded": (lambda n, x, r: n(x) + r[:1].expand_as(r), "add"),
    "transposed": (lambda n, x, r: n(x) + r.mT, "add"),
    "rounded": (lambda n, x, r: n(x) + r.half().to(r.dtype), "add"),
    "transposed first": (
        lambda n, x, r: r.mT + n(x),
        "the sum lies in memory as the other tensor",
    ),
    "alpha": (lambda n, x, r: torch.add(n(x), r, alpha=2), ALPHA),
    "alpha in place": (lambda n, x, r: n(x).add_(r, alpha=-1), ALPHA),
    "out": (lambda n, x, r: _out(n(x).detach(), r), "detach follows"),
    "in place, to the residual": (
        lambda n, x, r: r.add_(n(x)),
        "it is added in place to the other tensor",
    ),
    "a number": (lambda n, x, r: n(x) + 1.5, "it is added to a number"),
    "broadcast": (lambda n, x, r: n(x) + r[:1], SHAPE),
    "broadcast itself": (lambda n, x, r: n(x[:1]) + r, SHAPE),
    "another type": (
        lambda n, x, r: n(x) + r.half(),
        "it is added to a tensor of torch.float16, and is of torch.float64",
    ),
    "itself": (lambda n, x, r: _twice(n(x)), "it is added to itself"),
    "a view of itself": (lambda n, x, r: _halves(n(x)), "it is used 3 times"),
    "a difference": (lambda n, x, r: n(x) - r, "sub follows"),
}


def _twice(y):
    return y + y


def _halves(y):
    return y + y.flip(0).view_as(y)


def _out(y, r):
    return torch.add(y, r.detach(), out=torch.empty_like(y))


def test_sums_however_they_are_written():
    functions = [function for function, _ in SUMS.values()]
    found = assert_agrees(Table(functions), images())
    assert dict(zip(SUMS, found, strict=True)) == {name: as_ for name, (_, as_) in SUMS.items()}


def test_activations_of_sums():
    def of(function, activate):
        return lambda *inputs: activate(function(*inputs))

    both = [(f, as_, a) for f, as_ in SUMS.values() for a in (F.relu, torch.relu_)]
    found = assert_agrees(Table([of(f, a) for f, _, a in both]), images(), steps=1)
    for (_, as_, _), actual in zip(both, found, strict=True):
        assert actual == ("add + relu" if as_ == "add" else as_)


#: The activations that run with a batch norm, in all spellings.
ACTIVATIONS = {
    "relu": [
        F.relu, lambda y: F.relu(y, inplace=True), lambda y: F.relu(y, True), F.relu_, torch.relu,
        torch.relu_, lambda y: y.relu(), lambda y: y.relu_(), nn.ReLU(), nn.ReLU(True),
        lambda y: F.relu(input=y),
    ],
    "leaky_relu": [
        F.leaky_relu, lambda y: F.leaky_relu(y, 0.3), lambda y: F.leaky_relu(y, 0.3, True),
        lambda y: F.leaky_relu(y, negative_slope=0.3, inplace=True), F.leaky_relu_,
        lambda y: F.leaky_relu_(y, 0.3), nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, True),
        lambda y: F.leaky_relu(y, 0), lambda y: F.leaky_relu(y, -0.5), nn.LeakyReLU(2),
    ],
    "elu": [
        F.elu, lambda y: F.elu(y, 0.5), lambda y: F.elu(y, alpha=0.5, inplace=True), F.elu_,
        lambda y: F.elu_(y, 0.5), nn.ELU(0.4), nn.ELU(0.4, True), lambda y: F.elu(y, 0),
        lambda y: F.elu(y, -1.0),
    ],
    "silu": [F.silu, lambda y: F.silu(y, True), nn.SiLU(), nn.SiLU(True)],
    "gelu": [F.gelu, nn.GELU(), lambda y: F.gelu(y, approximate="none")],
    "sigmoid": [
        F.sigmoid, torch.sigmoid, torch.sigmoid_, lambda y: y.sigmoid(), lambda y: y.sigmoid_(),
        nn.Sigmoid(),
    ],
    "tanh": [F.tanh, torch.tanh, torch.tanh_, lambda y: y.tanh(), lambda y: y.tanh_(), nn.Tanh()],
    "relu6": [
        F.relu6, lambda y: F.relu6(y, True), nn.ReLU6(), nn.ReLU6(True), nn.Hardtanh(0, 6),
        lambda y: F.hardtanh(y, 0, 6), lambda y: F.hardtanh(y, max_val=6, min_val=0, inplace=True),
    ],
    "hardswish": [F.hardswish, lambda y: F.hardswish(y, True), nn.Hardswish(), nn.Hardswish(True)],
}  # fmt: skip

#: Functions that do not: what they are called.
OTHERS = {
    "gelu": nn.GELU("tanh"),
    "mish": F.mish,
    "softplus": F.softplus,
    "selu": F.selu,
    "selu_": F.selu_,
    "celu": nn.CELU(0.3),
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": nn.Hardtanh(),
    "elu_": lambda y: F.elu_(y, 0.5, scale=2.0),
    "special_expit": torch.special.expit,
    "prelu": lambda y: F.prelu(y, torch.full((4,), 0.2, dtype=y.dtype)),
    "rrelu": lambda y: F.rrelu(y, 0.3, 0.3),
    "clamp": lambda y: y.clamp(min=0),
    "clamp_": lambda y: y.clamp_(0, 6),
    "threshold_": lambda y: F.threshold_(y, 0, 0),
    "softmax": lambda y: F.softmax(y, 1),
    "glu": lambda y: F.glu(y, 1),
    "cumsum": lambda y: y.cumsum(0),
    "default": torch.ops.aten.relu_.default,
}


def test_activations_however_they_are_written():
    assert ACTIVATIONS.keys() == set(NAMES)
    expected = [(name, f) for name, spellings in ACTIVATIONS.items() for f in spellings]
    expected += [(f"{name} follows", f) for name, f in OTHERS.items()]
    table = Table([lambda n, x, r, f=f: f(n(x)) for _, f in expected])
    # large values, where relu6 and hardswish have an end
    found = assert_agrees(table, [4 * v for v in images()], steps=1)
    assert found == [name for name, _ in expected]


def test_activations_of_odd_values():
    x, residual = images(2, 4, 3, 3)
    x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    functions = [spellings[0] for spellings in ACTIVATIONS.values()]
    table = Table([lambda n, x, r, f=f: f(n(x) + r) for f in functions]).eval()
    with torch.no_grad():
        assert_agrees(table, [x, residual], steps=1)


def _leaves(m, y):
    m.seen = y
    return y


#: What something else sees is left alone, each with the reason.
SEEN = {
    "used twice": (lambda m, x, r: _and(y := m.norms[0](x), F.relu(y)), "it is used 2 times"),
    "a view": (
        lambda m, x, r: _and((y := m.norms[0](x)).view(-1), y.add_(r)),
        "it is used 2 times",
    ),
    "changed by a view": (
        lambda m, x, r: _and((y := m.norms[0](x)).view(-1).relu_(), y),
        "it is used 2 times",
    ),
    "kept by the module": (lambda m, x, r: F.relu(_leaves(m, m.norms[0](x))), "it is used 2 times"),
    "detached": (lambda m, x, r: F.relu(m.norms[0](x).detach() + r), "detach follows"),
    "changed when detached": (
        lambda m, x, r: _and((y := m.norms[0](x)).detach().mul_(2), F.relu(y + r)),
        "it is used 2 times",
    ),
    "changed after": (
        lambda m, x, r: _and(F.relu(y := m.norms[0](x)), y.add_(1)),
        "it is used 2 times",
    ),
    "changed as data": (
        lambda m, x, r: _and((y := m.norms[0](x)).data.mul_(2), m.convs[0](F.relu(y))),
        "it is used 2 times",
    ),
    "dropout": (lambda m, x, r: F.relu(F.dropout(m.norms[0](x), 0.5) + r), "dropout follows"),
    "dropout that does nothing": (
        lambda m, x, r: F.relu(F.dropout2d(m.norms[0](x), 0.5, False) + r),
        "add + relu",
    ),
    "dropout that does nothing, changed in place": (
        lambda m, x, r: _and(y := m.norms[0](x), F.dropout(y, 0.0).add_(r)),
        "it is used 2 times",
    ),
    "dropout that does nothing, used twice": (
        lambda m, x, r: _and(y := m.norms[0](x), F.dropout(y, 0.5, False) + r),
        "it is used 2 times",
    ),
    "collected": (
        lambda m, x, r: [F.relu(y) for y in (lambda seen: seen + seen)([m.norms[0](x)])],
        "it is used 2 times",
    ),
    "returned": (lambda m, x, r: m.norms[0](x), "it is returned"),
    "not used": (lambda m, x, r: _and(m.norms[0](x), r)[1], "nothing uses it"),
    "in place, then returned": (lambda m, x, r: _and(y := m.norms[0](x), y.relu_()), "relu"),
    "in place, then twice": (lambda m, x, r: _twice(F.relu(m.norms[0](x), inplace=True)), "relu"),
    "in place, then a view": (
        lambda m, x, r: _and(y := m.norms[0](x), y.add_(r).view(-1)),
        "add",
    ),
}


def _and(*values):
    return values


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_elsewhere_is_left_alone(name):
    function, expected = SEEN[name]
    assert assert_agrees(Network(function), images()) == [expected]
