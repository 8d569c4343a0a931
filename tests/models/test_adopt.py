"""Adoption: a layer of torch is one of ours for a while, and then again what it was."""

import copy
import io
import itertools

import pytest
import torch
from models.holding import attributes
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.models.adopt import adopt, check_adoptable, let_go, stock_class

STOCK = {
    nn.BatchNorm1d: (bn.BatchNorm1d, (6, 4)),
    nn.BatchNorm2d: (bn.BatchNorm2d, (6, 4, 3, 3)),
    nn.BatchNorm3d: (bn.BatchNorm3d, (6, 4, 3, 2, 2)),
}
OPTIONS = [{}, {"momentum": None, "eps": 1e-3}, {"affine": False}, {"track_running_stats": False}]


class Mine(nn.BatchNorm1d):
    """A layer of which nobody knows what its forward does."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("stock", STOCK)
def test_an_adopted_layer_computes_what_it_did(stock, options, training):
    ours, shape = STOCK[stock]
    layer = stock(4, **options).train(training)
    expected = copy.deepcopy(layer)
    adopted = adopt("norm", layer, "test")
    assert adopted is layer
    assert type(layer) is ours
    for _ in range(2):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), expected(x))
    torch.testing.assert_close(layer.state_dict(), expected.state_dict())
    assert repr(layer) == repr(expected)


@pytest.mark.parametrize("stock", [*STOCK, nn.SyncBatchNorm])
def test_let_go_gives_back_class_attributes_hooks_and_parameters(stock):
    layer = stock(4)
    parameters, buffers = [*layer.parameters()], [*layer.buffers()]
    layer.register_forward_hook(lambda *_: None)
    before = attributes(layer)
    adopted = adopt("norm", layer, "test")
    adopted.statistics, adopted.update, adopted.on_small_batch = "running", "never", "skip"
    adopted.ledger = adopted.pooled = None
    let_go(adopted, "test")
    assert attributes(layer) == before
    for now, then in zip(
        (*layer.parameters(), *layer.buffers()), (*parameters, *buffers), strict=True
    ):
        assert now is then


def test_it_is_ours_until_the_last_holder_lets_go():
    layer = nn.BatchNorm1d(4)
    for holders in itertools.permutations("abc"):
        for holder in "abc":
            adopt("norm", layer, holder)
        for holder in holders:
            assert type(layer) is bn.BatchNorm1d
            assert stock_class(layer) is nn.BatchNorm1d
            let_go(layer, holder)
        assert type(layer) is nn.BatchNorm1d
    let_go(layer, "a")  # which does not hold it
    assert stock_class(layer) is nn.BatchNorm1d


def test_ours_are_left_as_they_are():
    layer = bn.GhostBatchNorm(4, ghost_size=3)
    before = attributes(layer)
    assert adopt("norm", layer, "test") is layer
    let_go(layer, "test")
    assert attributes(layer) == before


def test_a_synchronized_layer_of_torch_stays_synchronized():
    layer = nn.SyncBatchNorm(4)
    adopted = adopt("norm", layer, "test")
    assert type(adopted) is bn.SyncBatchNorm
    assert adopted.process_group == "world"
    torch.testing.assert_close(adopted(x := torch.randn(6, 4)), nn.BatchNorm1d(4)(x))
    let_go(adopted, "test")
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is None


def test_a_subclass_is_refused_by_name():
    layer = Mine(3)
    with pytest.raises(TypeError, match=rf"'head.norm' is a {type(layer).__name__}, .* by where="):
        adopt("head.norm", layer, "test")
    with pytest.raises(TypeError, match=r"'b' is a"):
        check_adoptable({"a": nn.BatchNorm1d(3), "b": layer})


TOOLS = {
    "freeze": bn.freeze,
    "synchronize": bn.synchronize,
    "transaction": lambda model: bn.transaction(model).__enter__(),
    "calibrate": lambda model: bn.calibrate(model, [torch.randn(4, 3)]),
    "big_batch": lambda model: bn.big_batch(
        model, [torch.randn(4, 3)], lambda model, part: model(part).square().sum()
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_no_tool_changes_anything_before_it_refuses(tool):
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm(3), Mine(3)).train()
    before = attributes(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"'2' is a Mine, .* leave it out by where="):
        TOOLS[tool](model)
    assert attributes(model) == before
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_an_adopted_layer_is_copied_pickled_and_loaded_like_any_other():
    layer = nn.BatchNorm1d(3)
    bn.freeze(layer)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    twins = copy.deepcopy(layer), torch.load(stream, weights_only=False)
    for twin in twins:
        assert list(twin.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
        assert type(twin) is bn.BatchNorm1d
        bn.unfreeze(twin)
        assert type(twin) is nn.BatchNorm1d
    assert type(layer) is bn.BatchNorm1d  # and knows nothing of it


def test_a_lazy_layer_has_to_know_its_channels_first():
    layer = nn.LazyBatchNorm1d()
    with pytest.raises(TypeError, match=r"'head' is a LazyBatchNorm1d .*: run one batch through"):
        adopt("head", layer, "test")
    layer(torch.randn(4, 3))
    assert bn.freeze(layer).done == [""]


def test_a_half_layer_has_wide_statistics_for_as_long_as_it_is_ours():
    layer = nn.BatchNorm1d(1, momentum=2**-12).half()
    with bn.transaction(layer):
        assert layer.running_mean.dtype == torch.float32
    assert layer.running_mean.dtype == torch.float16
    bn.synchronize(layer)
    for _ in range(2):
        layer(torch.tensor([[0.0], [2]]).half())
    assert layer.running_mean.item() == pytest.approx(1 - (1 - 2**-12) ** 2, rel=1e-6)


def test_a_layer_that_went_to_half_meanwhile_is_a_half_layer_of_torch():
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3).half()
    expected = copy.deepcopy(layer).half()
    bn.freeze(layer)
    layer.half()
    bn.unfreeze(layer)
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), rtol=0, atol=0)
    bn.freeze(layer)
    layer.float()
    bn.unfreeze(layer)
    assert layer.running_var.dtype == torch.float32


def test_a_layer_that_was_parametrized_meanwhile_stays_ours():
    layer = nn.BatchNorm1d(3)
    bn.freeze(layer)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    bn.unfreeze(layer)
    assert isinstance(layer, bn.BatchNorm1d)
    layer(torch.randn(8, 3))
    parametrize.remove_parametrizations(layer, "weight")
    bn.freeze(layer)
    bn.unfreeze(layer)
    assert type(layer) is nn.BatchNorm1d


def test_an_attribute_of_the_same_name_is_not_taken_for_a_setting():
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    layer.activation = "relu"
    before, expected = attributes(layer), copy.deepcopy(layer)(x)
    bn.synchronize(layer)
    torch.testing.assert_close(layer(x), expected)
    bn.unsynchronize(layer)
    assert attributes(layer) == before


class Group:
    """What can be neither copied nor pickled, as a process group."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle Group")


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, bn.SyncBatchNorm])
def test_a_copy_shares_the_process_groups_of_before(norm):
    first, second = Group(), Group()
    layer = norm(3, process_group=first)
    bn.freeze(layer)
    bn.synchronize(layer, second)
    twin = copy.deepcopy(layer)
    assert twin.process_group is second
    for each in (layer, twin):
        bn.unfreeze(each)
        bn.unsynchronize(each)
        assert type(each) is norm
        assert each.process_group is first


def test_a_copy_made_inside_is_held_by_nothing_that_ended():
    layer = nn.BatchNorm1d(3)
    with bn.transaction(layer):
        twin = copy.deepcopy(layer)
    bn.freeze(twin)
    bn.unfreeze(twin)
    assert type(twin) is type(layer) is nn.BatchNorm1d
