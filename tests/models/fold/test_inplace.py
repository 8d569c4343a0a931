"""Activations that write over what was folded: where nothing else reads it, and nowhere else."""

import pytest
import torch
from models.fold.folding import IMAGES, fold, sequential
from torch import nn
from torch.nn import functional as F

import batchnorm as bn


def block(activation=nn.ReLU, n=1):
    return [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), *(activation() for _ in range(n))]


def inplace(model, **options):
    folded, _ = fold(model, IMAGES, **{"inplace": True, **options})
    return [m.inplace for m in folded.modules() if hasattr(m, "inplace")]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_after_what_was_folded(activation):
    model = sequential(*block(activation), *block(activation))
    assert inplace(model) == [True, True]
    assert not model[2].inplace


def test_it_has_to_be_asked_for():
    assert inplace(sequential(*block()), inplace=False) == [False]
    program = torch.export.export(sequential(*block()), (IMAGES.double(),))
    with pytest.raises(TypeError, match="inplace is of modules alone"):
        bn.fold(program, inplace=True)


def test_layers_that_were_not_chosen():
    assert inplace(sequential(*block(), *block()), where="4") == [False, True]


class Residual(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.conv, self.norm, self.relu = block()
        self.add = add

    def forward(self, x):
        return self.relu(self.add(self.norm(self.conv(x)), x))


def iadd(y, x):
    y += x
    return y


@pytest.mark.parametrize("add", [torch.add, iadd, lambda y, x: x + y, torch.Tensor.add_])
def test_after_a_sum(add):
    assert inplace(sequential(Residual(add), Residual(add))) == [True, True]


def test_a_sum_of_nothing_folded():
    class Net(Residual):
        def forward(self, x):
            return self.relu(x + x), self.norm(self.conv(x))

    assert inplace(sequential(Net(None))) == [False]


def test_a_parameter_is_not_written_over():
    class Net(Residual):
        def __init__(self, add):
            super().__init__(add)
            self.scale = nn.Parameter(torch.tensor([-1.0, 2.0]))

        def forward(self, x):
            return self.norm(self.conv(x)) * self.relu(self.scale).sum()

    assert inplace(sequential(Net(None))) == [False]


def test_a_sum_in_memory_of_another_is_not_written_over():
    assert inplace(sequential(Residual(lambda y, x: x.mul(1).add_(y)))) == [False]


def read_twice(self, x):
    y = self.norm(self.conv(x))
    return self.relu(y) * y


def returned(self, x):
    y = self.norm(self.conv(x))
    return self.relu(y), y


def on_the_input(self, x):
    return self.conv(self.relu(x)), self.norm(self.conv(self.relu(x)))


def through_a_view(self, x):
    y = self.norm(self.conv(x)).flatten(1)
    return self.relu(y)


def sometimes(self, x):
    return self.relu(self.norm(self.conv(self.relu(x))))


def not_folded(self, x):
    y = self.conv(x)
    return self.relu(self.norm(y)) + y


def behind_a_graph_break(self, x):
    y = self.relu(self.norm(self.conv(x)))
    torch._dynamo.graph_break()
    return self.relu(y)


@pytest.mark.parametrize(
    "forward",
    [
        read_twice,
        returned,
        on_the_input,
        through_a_view,
        sometimes,
        not_folded,
        behind_a_graph_break,
    ],
)
def test_what_something_else_sees_is_not_written_over(forward):
    class Net(Residual):
        def forward(self, x):
            return forward(self, x)

    assert inplace(sequential(Net(None))) == [False]


def test_what_a_hook_keeps_is_not_written_over():
    model, seen = sequential(*block()), []
    model[0].register_forward_hook(lambda *args: seen.append(args[-1]))
    assert inplace(model) == [False]


class Own(nn.ReLU):
    def forward(self, x):
        return F.relu(x) + 1


def test_subclasses_are_left():
    assert inplace(sequential(*block(Own))) == [False]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_gradients_pass(activation):
    folded, _ = fold(sequential(*block(activation), *block(activation)), IMAGES, inplace=True)
    x = IMAGES.double().requires_grad_()
    assert torch.autograd.gradcheck(folded, x[:1, :, :3, :3])
