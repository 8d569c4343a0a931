"""Checks of who takes part, and of when nobody is asked."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
from ranks.batches import (
    GATHER,
    STATISTICS,
    alone,
    assert_like_one,
    assert_named,
    counted,
    fails,
    layer_of,
    part,
    step,
)
from ranks.processes import check
from ranks.values import random
from torch import nn

import batchnorm as bn
from batchnorm.kernels import native

F64 = torch.float64


@check(4)
def two_groups_of_two(rank, size):
    """Ranks 0 and 3 normalize together, and so do 1 and 2."""
    pairs = (0, 3), (1, 2)
    groups = [dist.new_group(pair) for pair in pairs]
    shares = (3, 1, 4, 2)
    x, dy = random(10, 3, 2, mean=1.0), random(10, 3, 2)
    for group, pair in zip(groups, pairs, strict=True):
        if rank in pair:
            layer = layer_of(3, process_group=group)
            assert repr(layer).endswith("process_group='2 processes')")
            whole = alone(layer)
            own = part(x, shares, rank).requires_grad_(), part(dy, shares, rank)
            together = [torch.cat([part(v, shares, r) for r in pair]) for v in (x, dy)]
            expected = step(whole, together[0].requires_grad_(), together[1])
            found = step(layer, *own)
            at = [shares[r] for r in pair], pair.index(rank)
            for name in ("y", "dx"):
                assert_named(name, found[name], part(expected[name], *at), F64)
            for name in ("dweight", "dbias"):
                dist.all_reduce(found[name], group=group)
                assert_named(name, found[name], expected[name], F64)
            for name in STATISTICS:
                assert_named(name, getattr(layer, name), getattr(whole, name), F64)


@check(2, 3)
def who_is_in_no_group_is_told_so(rank, size):
    group = dist.new_group([0])
    layer = layer_of(3, process_group=group)
    x = random(4, 3)
    if rank == 0:  # a world of its own
        assert torch.equal(layer(x), alone(layer)(x))
    else:
        repr(layer)
        fails(lambda: layer(x), TypeError, "which this process is part of")
    fails(lambda: layer_of(3, process_group="wrold")(x), TypeError, "'wrold'")


@check(1)
def alone_in_the_world(rank, size):
    with counted() as calls:
        assert_is_local(layer_of(3))
    assert calls == []


@check(2)
def nobody_is_asked_in_evaluation(rank, size):
    layer = layer_of(3)
    layer(random(5 + rank, 3))
    with counted() as calls:
        assert_is_local(layer.eval())
        for _ in range(rank):  # as many batches as there are
            layer(random(4, 3))
        bn.batch_norm(random(4, 3), torch.zeros(3), torch.ones(3), process_group="world")
    assert calls == []


@check(2)
def nobody_is_asked_in_evaluation_without_running_statistics(rank, size):
    layer = layer_of(3, track_running_stats=False)
    with counted() as calls:
        assert_is_local(layer.eval())
    assert calls == []


@check(2)
def without_a_process_group_it_is_local(rank, size):
    layer = layer_of(3)
    dist.barrier()
    dist.destroy_process_group()
    assert_is_local(layer)
    assert_is_local(layer.eval())


def assert_is_local(layer):
    """Assert that a layer does what it does in a single process, with another batch on each."""
    torch.manual_seed(17 + (dist.get_rank() if dist.is_initialized() else 0))
    x, dy = random(6, 3, 2), random(6, 3, 2)
    other = alone(layer)
    expected = step(other, x.clone().requires_grad_(), dy)
    found = step(layer, x.requires_grad_(), dy)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    for name in STATISTICS:
        if getattr(layer, name) is not None:
            assert torch.equal(getattr(layer, name), getattr(other, name)), name


@check(2, 3)
def one_collective_each_way(rank, size):
    x, dy, residual = random(4 + rank, 3, 5), random(4 + rank, 3, 5), random(4 + rank, 3, 5)
    for settings in ({}, {"activation": "relu"}, {"affine": False}, {"momentum": None}):
        layer = layer_of(3, **settings)
        for arguments in ({}, {"residual": residual}, {"mask": torch.rand(4 + rank, 5)}):
            with counted() as first:
                layer(x)
            fresh = x.clone().requires_grad_()
            with counted() as forward:
                y = layer(fresh, **arguments)
            with counted() as backward:
                y.backward(dy)
            assert set(first) == {GATHER}  # with the handshake of the first call
            assert (forward, backward) == ([GATHER], ["all_reduce"])
    # the first layer of a network has no gradient to send back
    y = layer_of(3)(x)
    with counted() as backward:
        y.backward(dy)
    assert backward == []
    again = layer_of(3)
    with counted() as calls:
        for _ in range(3):
            again(x)
    assert calls == [GATHER] * 4


@check(2)
def no_value_is_read_back_from_the_device(rank, size):
    layer = layer_of(3, activation="relu", momentum=None)
    mask = torch.rand(4, 5) < 0.5
    x, dy = random(4, 3, 5).requires_grad_(), random(4, 3, 5)
    # as it is on a GPU
    with bn.backend("eager"), mock.patch.object(native, "follow", return_value=False):
        layer(x, mask=mask).backward(dy)
        with torch.profiler.profile() as profile:
            layer(x, mask=mask).backward(dy)
    names = {event.key for event in profile.key_averages()}
    assert any("batchnorm::gather" in name for name in names)
    assert not names & {
        "aten::item",
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::is_nonzero",
    }


@check(2)
def a_frozen_layer_asks_nobody(rank, size):
    frozen = layer_of(3, kind=bn.FrozenBatchNorm, process_group="world")
    frozen.running_mean.fill_(0.3)
    x = random(4 + rank, 3).requires_grad_()
    with counted() as calls:
        y = frozen(x)
        y.backward(random(4 + rank, 3))
    assert calls == []
    assert torch.equal(y, alone(frozen)(x))


@check(2)
def copies_of_a_layer_have_its_group(rank, size):
    group = dist.new_group([0, 1])
    model = nn.Sequential(nn.Linear(3, 3), bn.SyncBatchNorm(3, process_group=group)).double()
    other = copy.deepcopy(model)
    assert other[1].process_group is group
    assert other[1].running_mean is not model[1].running_mean
    assert_like_one(other[1], rank, (3, 6), random(9, 3), random(9, 3))
    assert model[1].num_batches_tracked == 0
    assert copy.deepcopy(bn.SyncBatchNorm(3)).process_group == "world"


@check(2)
def the_layer_of_torch_refuses_the_cpu(rank, size):
    x = random(4, 3)
    fails(lambda: nn.SyncBatchNorm(3).double()(x), ValueError, "expected input tensor to be on GPU")
    assert bn.SyncBatchNorm(3)(x).shape == x.shape
