"""Freezing: what normalizes, what follows, what trains; and undone, exactly."""

import copy
import itertools

import pytest
import torch
from models.holding import attributes, buffers_of
from support import assert_close
from torch import nn

import batchnorm as bn


def network(norm=nn.BatchNorm1d, **options):
    return nn.Sequential(nn.Linear(3, 5), norm(5, **options), nn.ReLU(), norm(5, **options))


def trained(model, batches=5):
    """Return the model after some batches, so that its statistics are not those of the start."""
    for _ in range(batches):
        model(torch.randn(16, 3) * 2 + 1)
    return model


def assert_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def snapshot(model):
    """Return what the modules hold, and which parameters require a gradient."""
    return attributes(model), [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, bn.BatchNorm1d, bn.GhostBatchNorm, bn.BatchRenorm]
)
def test_frozen_statistics_normalize_and_stay_whatever_train_says(norm):
    model = trained(network(norm, eps=0.01, momentum=0.3))
    expected, before = copy.deepcopy(model).eval(), buffers_of(model)
    report = bn.freeze(model, affine=False)
    assert report.done == ["1", "3"]
    for _ in range(3):
        x = torch.randn(8, 3) * 5
        y = model.train()(x)
        assert_close(y, expected(x), torch.float32, scale=4)
        y.square().sum().backward()
        assert_bits(buffers_of(model), before)
    assert all(model[at].training for at in (1, 3))
    assert {(model[at].eps, model[at].momentum) for at in (1, 3)} == {(0.01, 0.3)}
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_the_gradient_is_that_of_an_affine_map():
    layer = trained(bn.BatchNorm1d(3))
    stock = nn.BatchNorm1d(3).eval()
    stock.load_state_dict(layer.state_dict())
    bn.freeze(layer, affine=False)
    x, dy = torch.randn(8, 3), torch.randn(8, 3)
    found = []
    for module in (layer.train(), stock):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(dy)
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, torch.float32, "sum")
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    assert_close(found[0][0], dy * scale, torch.float32)


def test_a_frozen_affine_part_alone_leaves_the_statistics_moving():
    model = network()
    bn.freeze(model, statistics=False)
    assert type(model[1]) is nn.BatchNorm1d
    trained(model, 1)
    assert model[1].num_batches_tracked == 1
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("where", "frozen"),
    [
        ("1", {"1"}),
        (["1", "3"], {"1", "3"}),
        (lambda name, layer: name == "3", {"3"}),
    ],
)
def test_where_says_which(where, frozen):
    model = network()
    assert set(bn.freeze(model, where=where).done) == frozen
    trained(model, 1)
    for name in ("1", "3"):
        layer = model.get_submodule(name)
        assert (layer.num_batches_tracked == 0) == (name in frozen)
        assert layer.weight.requires_grad == (name not in frozen)


@pytest.mark.parametrize("parts", [{}, {"affine": False}, {"statistics": False}], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d, bn.SyncBatchNorm])
def test_unfreezing_gives_back_every_attribute(norm, parts):
    model = trained(network(norm))
    model[3].bias.requires_grad_(False)
    before = snapshot(model)
    bn.freeze(model, **parts)
    assert snapshot(model) != before
    trained(model.eval().train(), 2)
    assert bn.unfreeze(model).done == ["1", "3"]
    assert snapshot(model) == before
    assert bn.unfreeze(model).left == dict.fromkeys(["1", "3"], "it was not frozen")


def test_statistics_and_affine_are_undone_apart():
    model = network()
    before = snapshot(model)
    bn.freeze(model)
    bn.unfreeze(model, affine=False)
    assert type(model[1]) is nn.BatchNorm1d
    assert not model[1].weight.requires_grad
    bn.freeze(model, affine=False)
    bn.unfreeze(model, statistics=False)
    assert model[1].weight.requires_grad
    assert model[1].statistics == "running"
    bn.unfreeze(model, where="1")
    bn.unfreeze(model, where="3")
    assert snapshot(model) == before


def test_twice_frozen_is_once_undone():
    model = network(bn.BatchNorm1d, statistics="batch", update="grad")
    before = snapshot(model)
    bn.freeze(model, affine=False)
    assert bn.freeze(model).done == ["1", "3"]
    bn.freeze(model, where="1")
    bn.unfreeze(model)
    assert snapshot(model) == before
    assert (model[1].statistics, model[1].update) == ("batch", "grad")


#: What holds a layer for a while: how it begins, and how it ends.
HOLDS = {
    "freeze": (bn.freeze, lambda model, held: bn.unfreeze(model)),
    "synchronize": (bn.synchronize, lambda model, held: bn.unsynchronize(model)),
    "transaction": (
        lambda model: bn.transaction(model).__enter__(),
        lambda model, held: held.__exit__(None, None, None),
    ),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_it_goes_with_the_other_tools_in_any_order(norm):
    model = network(norm)
    before = snapshot(model)
    for begun, ended in itertools.product(itertools.permutations(HOLDS), repeat=2):
        held = {name: HOLDS[name][0](model) for name in begun}
        assert all(isinstance(model[at], bn.BatchNorm1d) for at in (1, 3))
        trained(model, 1)
        for name in ended:
            HOLDS[name][1](model, held[name])
        assert snapshot(model) == before, (begun, ended)
    assert model[1].num_batches_tracked == 0  # frozen at every forward pass


def test_a_layer_without_statistics_is_left_with_the_reason():
    layer = nn.BatchNorm1d(3, track_running_stats=False)
    report = bn.freeze(layer, affine=False)
    assert report.left == {"": "it has no running statistics to normalize by"}
    assert type(layer) is nn.BatchNorm1d
    bn.freeze(layer)
    assert not layer.weight.requires_grad
    bn.unfreeze(layer)
    assert layer.weight.requires_grad


def test_a_shared_affine_part_is_frozen_and_unfrozen_once():
    layer = bn.BankedBatchNorm(3, banks=("a", "b"), share_affine=True)
    bn.freeze(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    bn.unfreeze(layer)
    assert all(p.requires_grad for p in layer.parameters())


class Mine(nn.BatchNorm1d):
    """A layer of which nobody knows what its forward does."""


def test_subclasses_are_refused_by_name_and_may_be_left_out():
    model = nn.Sequential(nn.BatchNorm1d(3), Mine(3))
    with pytest.raises(TypeError, match=r"'1' is a Mine, .* leave it out by where="):
        bn.freeze(model)
    assert type(model[0]) is nn.BatchNorm1d
    bn.freeze(model, where=lambda name, layer: not isinstance(layer, Mine))
    assert bn.freeze(model, statistics=False).done == ["0", "1"]  # which needs no forward


def test_a_frozen_model_is_copied_saved_and_loaded():
    model = trained(network())
    bn.freeze(model)
    x = torch.randn(8, 3)
    twin = copy.deepcopy(model)
    trained(twin)
    assert_bits(twin(x), model(x))
    stock = network().eval()
    assert list(model.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(model.state_dict())
    assert_close(model(x), stock(x), torch.float32)
    again = network()
    bn.freeze(again)
    again.load_state_dict(model.state_dict())
    assert_bits(again.train()(x), model(x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_made_before_stays_valid(optimizer):
    model = network()
    steps = optimizer(model.parameters(), lr=0.1)

    def step():
        steps.zero_grad()
        model(torch.randn(16, 3)).square().mean().backward()
        steps.step()

    step()
    bn.freeze(model)
    before = [model[1].weight.clone(), model[0].weight.clone()]
    step()
    assert torch.equal(model[1].weight, before[0])
    assert not torch.equal(model[0].weight, before[1])
    bn.unfreeze(model)
    step()
    assert not torch.equal(model[1].weight, before[0])


def test_a_frozen_layer_takes_one_example_alone():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))
    bn.freeze(layer)
    assert layer(torch.randn(1, 3)).shape == (1, 3)


def test_the_layer_made_frozen_is_the_frozen_layer():
    stock = trained(nn.BatchNorm1d(3))
    layer = bn.FrozenBatchNorm(3)
    layer.load_state_dict(stock.state_dict())
    bn.freeze(stock)
    x = torch.randn(8, 3)
    assert_bits(layer.train()(x), stock.train()(x))
    assert not any(p.requires_grad for p in layer.parameters())
    assert_bits(layer.state_dict(), stock.state_dict())


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_what_a_parametrized_weight_is_made_from_is_frozen(norm):
    layer = norm(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    layer.bias.requires_grad_(False)
    original = layer.parametrizations.weight.original
    assert bn.freeze(layer, statistics=False).done == [""]
    assert not layer(torch.randn(8, 3)).requires_grad
    bn.unfreeze(layer)
    assert [p.requires_grad for p in (original, layer.bias)] == [True, False]
    if norm is nn.BatchNorm1d:
        with pytest.raises(TypeError, match=r"parametrized, .* a ParametrizedBatchNorm1d"):
            bn.freeze(layer)
        assert original.requires_grad
