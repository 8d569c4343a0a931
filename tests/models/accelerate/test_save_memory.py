"""What is kept for the backward pass with `save_memory`, and that nothing but that changes."""

import copy

import pytest
import torch
from models.accelerate.agreement import WAYS, Ways, assert_agrees, assert_same
from models.accelerate.networks import blocks, doubles, images, network, start
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.models.memory import kept_bytes


def chain(m, x, r):
    return m.convs[2](F.silu(m.norms[1](m.convs[1](start(m, x)))))


def activated_first(m, x, r):
    for norm, conv in zip(m.norms, m.convs, strict=True):
        x = x + conv(F.relu(norm(x)))
    return x


def other_activation(m, x, r):
    return m.convs[1](F.mish(m.norms[0](m.convs[0](x))))


def gate(m, x, r):
    y = F.silu(m.norms[0](m.convs[0](x)))
    return m.convs[2](y * torch.sigmoid(m.convs[1](y.mean((2, 3), keepdim=True))))


def products(m, x, r):
    y = start(m, x)
    return m.convs[1](y * y), m.convs[2](2 * y), torch.mul(3.0, y), r * y.mul(2)


def pad(m, x, r):
    return m.convs[1](F.pad(start(m, x), (1,) * 4)), m.convs[2](F.pad(start(m, r), (0, -1)))


def views(m, x, r):
    y, s = start(m, x), m.convs[1].weight.sum()
    return m.convs[2](y[:2]), y.transpose(2, 3).flatten(1) * s, y[1:, 1] * r[1:, 1], y.mT * s


def returned(m, x, r):
    y = start(m, x)
    return y, m.convs[1](y)


def changed_before(m, x, r):
    y = F.silu(m.norms[0](m.convs[0](x)))
    y.mul_(2)
    return m.convs[1](y)


def not_activated(m, x, r):
    return m.convs[1](m.norms[0](m.convs[0](x)))


def normalized_twice(m, x, r):
    return m.convs[1](m.norms[1](start(m, x)))


def pooled(m, x, r):
    return F.max_pool2d(start(m, x), 2)


def joined(m, x, r):
    y = torch.cat([start(m, x), x], 1)
    return m.convs[1](y[:, :4]), m.convs[2](y[:, 2:6])


def dropped(m, x, r):
    return m.convs[1](F.dropout(start(m, x), 0.3))


def not_recorded(m, x, r):
    with torch.no_grad():
        y = start(m, x)
    return m.convs[1](y)


#: How many tensors of the size of x are kept for the backward pass, in whole numbers: fused, and
#: saving memory. What the convolutions give, and the batch norms need, is left of each block.
KEPT = {
    chain: (4, 2),
    blocks: (12, 6),
    activated_first: (5, 2),
    other_activation: (3, 1),
    gate: (3, 1),
    products: (4, 1),
    pad: (4, 2),
    views: (3, 2),
    returned: (2, 1),
    changed_before: (2, 2),
    not_activated: (2, 1),
    normalized_twice: (3, 1),
    pooled: (2, 1),
    joined: (3, 3),
    dropped: (3, 3),
    not_recorded: (1, 1),
}


@pytest.mark.parametrize("function", KEPT, ids=lambda function: function.__name__)
def test_less_is_kept_and_the_gradients_are_the_same(function):
    model, ways, (x, r) = network(function), Ways(), doubles()
    assert_agrees(model, [x, r], steps=1, ways=ways)
    there, kept = [x, r, *model.parameters(), *model.buffers()], []
    for ways.way in WAYS:
        kept.append(kept_bytes(ways.compiled(x, r), exclude=there) // (x.numel() * 8))
    assert tuple(kept) == KEPT[function]


def test_a_long_network():
    """Recipes follow on each other no deeper than some: then one begins anew."""

    def function(m, x, r):
        for _ in range(70):
            x = F.relu(m.norms[0](m.convs[0](x)) + x)
        return x

    assert_agrees(network(function), images(2, 4, 3, 3), steps=1, error=1e-9)


def test_nothing_is_kept_where_nothing_is_recorded():
    (x, r), model = doubles(), network(chain)
    fast = bn.accelerate(model, save_memory=True)
    expected = copy.deepcopy(model)(x, r)
    with torch.no_grad():
        y = fast(x, r)
    assert (y.grad_fn, kept_bytes(y)) == (None, 0)
    assert_same({"y": y}, {"y": expected.detach()}, 1e-12)


def test_a_step_in_evaluation():
    (x, r), model = doubles(), network(blocks).eval()
    model.norms.requires_grad_(False)
    assert assert_agrees(model, [x, r]) == ["add + relu"] * 6
