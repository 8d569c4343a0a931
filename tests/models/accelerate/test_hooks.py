"""Hooks of modules and of tensors: they see what they see without, and may change it."""

import pytest
from models.accelerate.agreement import assert_agrees
from models.accelerate.networks import Network, images
from torch import nn
from torch.nn import functional as F

FUSED = "add + relu"


def test_a_module_that_hooks_change():
    def function(m, x, r):
        return [F.relu(norm(x) + r) for norm in m.norms]

    model = Network(function)
    model.norms.extend(nn.BatchNorm2d(4) for _ in range(4))
    model.norms[0].register_forward_hook(lambda module, args, y: None if y.ndim else y)
    model.norms[1].register_forward_hook(lambda module, args, y: y * 2)
    model.norms[2].register_forward_hook(lambda module, args, y: y.mul_(2))
    model.norms[3].register_forward_hook(lambda module, args, y: setattr(module, "seen", y))
    model.norms[4].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.norms[5].register_forward_hook(lambda module, args, y: y.relu_(), always_call=True)
    found = assert_agrees(model, images(), steps=1)
    assert found == [
        FUSED, "mul follows", "mul_ follows", "it is used 2 times", FUSED, "relu", FUSED,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["backward", "backward before", "of the activation"])
def test_hooks_of_the_backward_pass(kind):
    def function(m, x, r):
        return [m.activation(norm(x) + r) for norm in m.norms]

    model = Network(function)
    model.activation = nn.ReLU()
    if kind == "backward":
        model.norms[0].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,))
    elif kind == "backward before":
        model.norms[0].register_full_backward_pre_hook(lambda module, dy: (dy[0] * 3,))
    else:
        model.activation.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,))
    assert_agrees(model, images(), steps=1)


def test_hooks_of_tensors():
    def function(m, x, r):
        y, z = m.norms[0](x), F.relu(m.norms[1](x) + r)
        y.register_hook(lambda g: 2 * g)
        z.register_hook(lambda g: 3 * g)
        return F.relu(y + r), z

    found = assert_agrees(Network(function), images(), steps=1)
    assert found == ["register_hook follows", FUSED]


def test_a_gradient_that_is_retained():
    def function(m, x, r):
        m.seen = m.norms[0](x)
        m.seen.retain_grad()
        return F.relu(m.seen + r)

    model = Network(function)
    assert_agrees(model, images(), steps=1)
    assert model.seen.grad is not None
