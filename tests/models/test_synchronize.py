"""Synchronizing and back, on one process; what it does on several is in tests/ranks."""

import copy
import itertools

import pytest
import torch
from models.holding import attributes
from torch import nn

import batchnorm as bn


def network(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, eps=1e-3, momentum=None), nn.ReLU(), norm(4))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d, bn.GhostBatchNorm])
def test_there_and_back_is_where_it_was(norm):
    model = network(norm)
    model[1].register_forward_hook(lambda *_: None)
    before = attributes(model)
    assert bn.synchronize(model).done == ["1", "3"]
    for layer in (model[1], model[3]):
        assert isinstance(layer, bn.BatchNorm)
        assert layer.process_group == "world"
        assert isinstance(layer, norm)  # and what looks for that still finds it
    assert bn.synchronize(model).done == ["1", "3"]  # twice is once
    assert bn.unsynchronize(model).done == ["1", "3"]
    assert attributes(model) == before
    assert bn.unsynchronize(model).left == dict.fromkeys(["1", "3"], "it was local")
    assert attributes(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_computes_what_it_did_on_the_cpu_too(training):
    model = network().train(training)
    expected = copy.deepcopy(model)
    bn.synchronize(model)
    x, dy = torch.randn(5, 3, 8, 8), torch.randn(5, 4, 6, 6)
    for module in (model, expected):
        module(x).backward(dy)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    for mine, truth in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad, rtol=1e-4, atol=1e-5)


def test_a_running_training_goes_on():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    bn.synchronize(model, where="1")
    assert model[1].process_group == "world"
    assert type(model[3]) is nn.BatchNorm2d
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    before = model[1].weight.clone()
    model(torch.randn(5, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    assert list(model.state_dict()) == list(network().state_dict())


def test_the_synchronized_layer_of_torch_becomes_local():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    state = copy.deepcopy(model.state_dict())
    assert bn.unsynchronize(model).done == ["1", "3"]
    torch.testing.assert_close(model.state_dict(), state)
    assert (model[1].eps, model[1].momentum, model[1].process_group) == (1e-3, None, None)
    model(torch.randn(5, 3, 8, 8))
    bn.synchronize(model)
    bn.unsynchronize(model)
    assert model[1].process_group is None


class Mine(nn.SyncBatchNorm):
    """A layer of which nobody knows what its forward does."""


def test_a_subclass_of_it_is_an_error_and_nothing_changes():
    model = nn.Sequential(bn.SyncBatchNorm(4), Mine(4))
    with pytest.raises(TypeError, match="'1' is a Mine"):
        bn.unsynchronize(model)
    assert model[0].process_group == "world"
    assert bn.unsynchronize(model, where="0").done == ["0"]


def test_ours_becomes_local_and_its_settings_stay():
    layer = bn.SyncBatchNorm(4, activation="relu", ghost_size=2)
    bn.unsynchronize(layer)
    assert (layer.process_group, layer.activation, layer.ghost_size) == (None, "relu", 2)


@pytest.mark.parametrize("norm", [bn.SyncBatchNorm, nn.SyncBatchNorm])
@pytest.mark.parametrize("tool", ["freeze", "transaction"])
def test_what_another_tool_holds_stays_local_when_that_lets_it_go(tool, norm):
    layer = norm(4)
    begin, end = {
        "freeze": (bn.freeze, lambda _: bn.unfreeze(layer)),
        "transaction": (
            lambda layer: bn.transaction(layer).__enter__(),
            lambda held: held.__exit__(None, None, None),
        ),
    }[tool]
    held = begin(layer)
    bn.unsynchronize(layer)
    end(held)
    assert layer.process_group is None
    assert layer(torch.randn(6, 4)).shape == (6, 4)


def test_models_with_it_are_copied_and_go_to_half():
    model = network()
    bn.synchronize(model)
    twin = copy.deepcopy(model).half()
    assert twin[1].process_group == "world"
    assert twin[1].running_mean.dtype == torch.float32
    bn.unsynchronize(twin)
    assert type(twin[1]) is nn.BatchNorm2d
    assert model[1].process_group == "world"


def test_banks_are_synchronized_each():
    layer = bn.BankedBatchNorm(4, banks=("a", "b"))
    assert bn.synchronize(layer).done == ["banks.a", "banks.b"]
    assert {layer[name].process_group for name in "ab"} == {"world"}


def test_every_order_of_two_tools_ends_where_it_began():
    model = network()
    before = attributes(model)
    for order in itertools.permutations(("freeze", "synchronize")):
        for name in order:
            getattr(bn, name)(model)
        for name in order:
            getattr(bn, f"un{name}")(model)
        assert attributes(model) == before


def test_undone_is_what_was_before_and_a_second_call_makes_it_local():
    first, second = object(), object()
    layer = bn.SyncBatchNorm(4, process_group=first)
    bn.synchronize(layer, second)
    bn.synchronize(layer)
    reason = "it has the process group again that it had before synchronize"
    assert bn.unsynchronize(layer).left == {"": reason}
    assert layer.process_group is first
    assert bn.unsynchronize(layer).done == [""]
    assert layer.process_group is None
    bn.synchronize(layer, second)
    assert bn.unsynchronize(layer).done == [""]
    assert layer.process_group is None
