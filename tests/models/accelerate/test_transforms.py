"""Gradients of gradients, transforms, and what else looks into a model."""

import copy

import pytest
import torch
from models.accelerate.agreement import WAYS, Ways, assert_agrees, assert_same, step
from models.accelerate.networks import doubles, images, network
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import batchnorm as bn

NON_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf"


def test_gradients_of_gradients():
    def found(run, model):
        inputs = [v.clone().requires_grad_() for v in (x, r)]
        leaves = [*inputs, *model.norms.parameters(), *(conv.weight for conv in model.convs)]
        first = torch.autograd.grad(run(*inputs), leaves, dy, create_graph=True)
        torch.manual_seed(2)
        total = sum((g * torch.randn_like(g)).sum() for g in first)
        second = torch.autograd.grad(total, leaves, materialize_grads=True)
        return dict(enumerate([*(g.detach() for g in first), *second]))

    x, r, dy = doubles(n=3)
    model, ways = network(), Ways()
    compiled = torch.compile(model, backend=ways)
    expected = found(model, model)
    for ways.way in WAYS:
        assert_same(found(compiled, model), expected, 1e-11)


def test_several_gradients_at_once():
    def found(run):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(run(leaf, r), leaf, dy, is_grads_batched=True)[0]

    (x, r), model = doubles(), network()
    dy = torch.randn(2, *x.shape, dtype=x.dtype)
    expected = found(copy.deepcopy(model))
    assert_same({"dx": found(bn.accelerate(model, save_memory=True))}, {"dx": expected}, 1e-12)


def _gradient(run, x, r):
    return torch.func.grad(lambda x: run(x, r).pow(3).sum())(x).detach()


def _mapped(run, x, r):
    return torch.func.vmap(lambda x, r: run(x[None], r[None])[0])(x, r).detach()


def _forward_mode(run, x, r):
    return torch.func.jvp(lambda x: run(x, r), (x,), (r,))[1].detach()


def _functional(run, x, r):
    parameters = {name: 2 * p for name, p in run.named_parameters()}
    return torch.func.functional_call(run, parameters, (x, r)).detach()


@pytest.mark.filterwarnings(NON_LEAF)
@pytest.mark.parametrize("transform", [_gradient, _mapped, _forward_mode, _functional])
@pytest.mark.parametrize("save_memory", [False, True])
def test_transforms_around_it(transform, save_memory):
    (x, r), model = doubles(), network().eval()
    expected = transform(model, x, r)
    actual = transform(bn.accelerate(model, save_memory=save_memory), x, r)
    assert_same({"": actual}, {"": expected}, 1e-12)


def test_transforms_inside():
    def mapped(m, x, r):
        def one(x, r):
            return F.relu(m.norms[0](x[None]) + r[None])[0]

        return torch.func.vmap(one)(x, r) * F.relu(m.norms[1](m.convs[0](x)) + r)

    def gradient(m, x, r):
        y = F.relu(m.norms[0](m.convs[0](x)))
        g = torch.func.grad(lambda v: F.relu(m.norms[1](v) + r).pow(3).sum())(y.detach())
        return F.relu(m.norms[2](y)) * g

    assert_agrees(network(mapped).eval(), images(), steps=1)
    model, inputs = network(gradient).eval(), doubles()
    assert_same(step(bn.accelerate(model), inputs), step(model, inputs), 1e-12)


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # by Dynamo
def test_functions_of_the_user():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * x.cos()

    def function(m, x, r):
        return m.convs[0](Odd.apply(F.relu(m.norms[0](x) + r)))

    assert assert_agrees(network(function), images(), steps=1) == ["add + relu"]


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_modes_that_see_every_operation():
    (x, r), model = doubles(), network()
    expected = step(copy.deepcopy(model), [x, r])
    with FlopCounterMode(display=False):
        assert_same(step(bn.accelerate(model, save_memory=True), [x, r]), expected, 1e-12)
