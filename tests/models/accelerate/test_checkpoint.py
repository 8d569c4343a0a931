"""With `torch.utils.checkpoint`: the same gradients, and statistics that move once."""

import copy
from functools import partial

import pytest
import torch
from models.accelerate.agreement import WAYS, Ways, assert_same, step
from models.accelerate.networks import doubles, network
from models.holding import buffers_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from batchnorm.kernels import native
from batchnorm.models.memory import kept_bytes

NON_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf"


def first(m, x, r):
    return F.relu(m.norms[0](m.convs[0](x)) + r)


def second(m, y):
    return F.dropout(F.silu(m.norms[1](m.convs[1](y))), 0.3)


def third(m, y):
    return m.convs[2](F.relu(m.norms[2](y) + y))


def without(m, x, r):
    return third(m, second(m, first(m, x, r)))


def parts(m, x, r, reentrant=False, **options):
    y = checkpoint(partial(first, m), x, r, use_reentrant=reentrant, **options)
    y = checkpoint(partial(second, m), y, use_reentrant=reentrant, **options)
    return third(m, y)


def odd_sums(m, x, r):
    def part(x, r):
        y = m.norms[0](m.convs[0](x)).add_(r, alpha=2)
        return F.silu(y).add_(other=r)

    return third(m, second(m, checkpoint(part, x, r, use_reentrant=False)))


def nested(m, x, r):
    def part(x, r):
        return checkpoint(partial(second, m), first(m, x, r), use_reentrant=False)

    return third(m, checkpoint(part, x, r, use_reentrant=False))


def broken(m, x, r):
    def part(x, r):
        y = first(m, x, r)
        torch._dynamo.graph_break()
        return second(m, y)

    return third(m, checkpoint(part, x, r, use_reentrant=False))


def selected(m, x, r):
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    return parts(m, x, r, context_fn=contexts)


def truth(function, inputs, **options):
    """Return a step of the model without a checkpoint, which moves statistics once."""
    return step(network(function, **options), inputs)


INSIDE = {
    parts: without,
    partial(parts, reentrant=True): without,
    nested: without,
    selected: without,
    odd_sums: lambda m, x, r: third(
        m, second(m, F.silu(m.norms[0](m.convs[0](x)).add_(r, alpha=2)).add_(r))
    ),
}


@pytest.mark.parametrize("function", INSIDE, ids=["", "reentrant", "nested", "selected", "sums"])
def test_inside(function):
    inputs = doubles()
    expected = truth(INSIDE[function], inputs)
    ways, model = Ways(), network(function)
    compiled, before = ways.compile(model), copy.deepcopy(model.state_dict())
    for ways.way in WAYS:
        model.load_state_dict(before)
        assert_same(step(compiled, inputs), expected, 1e-12)


@pytest.mark.filterwarnings(NON_LEAF)
def test_where_the_graph_breaks():
    inputs = doubles()
    expected = _unmoved(truth(without, inputs))
    for save_memory in (False, True):
        fast = bn.accelerate(network(broken), save_memory=save_memory)
        assert_same(_unmoved(step(fast, inputs)), expected, 1e-12)


def _unmoved(found):
    return {name: v for name, v in found.items() if "buffer" not in name}


class Around(nn.Module):
    """A model under a checkpoint.

    Args:
        run: The model.
        reentrant: How.
    """

    def __init__(self, run, reentrant):
        super().__init__()
        self.run, self.reentrant = run, reentrant

    def forward(self, *inputs):
        return checkpoint(self.run, *inputs, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings(NON_LEAF)
@pytest.mark.parametrize("reentrant", [False, True])
def test_around(reentrant):
    inputs = doubles()
    expected = truth(without, inputs)
    ways, model = Ways(), network(without)
    around, before = Around(ways.compile(model), reentrant), copy.deepcopy(model.state_dict())
    for ways.way in WAYS:
        model.load_state_dict(before)
        assert_same(step(around, inputs), expected, 1e-12)


@pytest.mark.parametrize("function", [parts, without])
def test_without_kernels(function, monkeypatch):
    monkeypatch.setattr(native, "takes", lambda x: False)
    inputs = doubles()
    expected = truth(without, inputs)
    fast = bn.accelerate(network(function))
    if function is without:
        fast = Around(fast, reentrant=False)
    assert_same(step(fast, inputs), expected, 1e-12)


def test_layers_of_ours():
    inputs = doubles()
    expected = truth(without, inputs, norm=bn.BatchNorm2d)
    for save_memory in (False, True):
        fast = bn.accelerate(network(parts, norm=bn.BatchNorm2d), save_memory=save_memory)
        assert_same(step(fast, inputs), expected, 1e-12)
        torch._dynamo.reset()


def test_another_backend_inside():
    inputs = doubles()
    fast = bn.accelerate(network(parts), inner="aot_eager", save_memory=True)
    assert_same(_unmoved(step(fast, inputs)), _unmoved(truth(without, inputs)), 1e-12)


def test_nothing_is_kept_of_what_is_under_it():
    x, r = doubles()
    kept = []
    for function in (without, parts):
        for save_memory in (False, True):
            model = network(function)
            y = bn.accelerate(model, save_memory=save_memory)(x, r)
            there = [x, r, *model.parameters(), *model.buffers()]
            kept.append(kept_bytes(y, exclude=there) // (x.numel() * 8))
            torch._dynamo.reset()
    assert kept[1] < kept[0]
    assert kept[3] <= kept[1]
    assert kept[3] < kept[2]


def test_several_steps_move_statistics_once_each():
    inputs = doubles()
    stock, model = network(without), network(parts)
    fast = bn.accelerate(model, save_memory=True)
    for seed in range(4):
        step(stock, inputs, seed)
        step(fast, inputs, seed)
    assert_same(buffers_of(model), buffers_of(stock), 1e-12)
    assert model.norms[0].num_batches_tracked == 4
