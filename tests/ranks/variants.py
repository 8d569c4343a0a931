"""Checks of what goes together with synchronization, and of batches that are not usual."""

import copy

import torch
import torch.distributed as dist
from ranks.batches import (
    GATHER,
    STATISTICS,
    alone,
    assert_like_one,
    assert_named,
    assert_same_everywhere,
    assert_statistics_like_one,
    counted,
    layer_of,
    part,
    step,
)
from ranks.processes import check
from ranks.values import random

import batchnorm as bn

F64 = torch.float64


@check(2, 3)
def ghost_groups_are_local_and_their_update_is_not(rank, size):
    shares = (7, 4) if size == 2 else (7, 0, 5)
    x, dy = random(sum(shares), 3, 2, mean=3.0), random(sum(shares), 3, 2)
    layer = layer_of(3, kind=bn.GhostBatchNorm, ghost_size=3, process_group="world")
    local, whole = alone(layer), alone(layer)
    whole.ghost_size = None
    own, own_dy = part(x, shares, rank), part(dy, shares, rank)
    for _ in range(2):
        with counted() as calls:
            found = step(layer, own.clone().requires_grad_(), own_dy)
        expected = step(local, own.clone().requires_grad_(), own_dy)
        whole(x)
        for name, values in expected.items():
            assert_named(name, found[name], values, F64)
        assert_statistics_like_one(layer, whole)
    assert calls == [GATHER]


@check(2)
def ghost_groups_of_one_value_leave_nobody_waiting(rank, size):
    """A last batch of one value on one of the ranks, which does not normalize."""
    for chosen in ("skip", "running"):
        layer = layer_of(
            3, kind=bn.GhostBatchNorm, ghost_size=2, process_group="world", on_small_batch=chosen
        )
        x = random(5, 3)
        layer(part(x, (4, 1), rank))
        layer(part(x, (4, 1), rank))
        assert_same_everywhere(layer)


@check(2, 3)
def renorm_corrects_the_moments_of_all(rank, size):
    shares = (3, 6) if size == 2 else (3, 0, 6)
    limits = {"warmup_batches": 0, "r_batches": 0, "d_batches": 0, "r_max": 1.5, "d_max": 0.5}
    layer = layer_of(3, kind=bn.BatchRenorm, process_group="world", **limits)
    for mean in (0.0, 0.5, 8.0):  # within the limits, and beyond
        x, dy = random(9, 3, 4, mean=mean), random(9, 3, 4)
        assert_like_one(layer, rank, shares, x, dy)


@check(2, 3)
def banks_of_a_mixed_batch(rank, size):
    """The last rank lacks a domain, which the others still wait for."""
    shares = (6, 3) if size == 2 else (6, 0, 3)
    index = torch.tensor([0, 1, 2, 1, 0, 2, 0, 1, 0])
    layer = bn.BankedBatchNorm(3, banks=("a", "b", "c"), layer=bn.SyncBatchNorm, dtype=F64)
    whole = bn.BankedBatchNorm(3, banks=("a", "b", "c"), dtype=F64)
    x, dy = random(9, 3, 2, mean=2.0), random(9, 3, 2)
    for _ in range(2):
        wide, own = x.clone().requires_grad_(), part(x, shares, rank).requires_grad_()
        for module in (layer, whole):
            module.zero_grad()
        expected, y = whole(wide, domain=index), layer(own, domain=part(index, shares, rank))
        expected.backward(dy)
        y.backward(part(dy, shares, rank))
        assert_named("y", y, part(expected, shares, rank), F64)
        assert_named("dx", own.grad, part(wide.grad, shares, rank), F64)
        for (name, p), q in zip(layer.named_parameters(), whole.parameters(), strict=True):
            dist.all_reduce(p.grad)
            assert_named(name, p.grad, q.grad, F64)
        for name in layer.names:
            for statistic in STATISTICS:
                values = getattr(whole[name], statistic)
                assert_named(statistic, getattr(layer[name], statistic), values, F64)
        assert_same_everywhere(layer)


@check(2)
def running_statistics_that_normalize_follow_all(rank, size):
    layer = layer_of(3, statistics="running", update="training")
    for _ in range(2):
        assert_like_one(layer, rank, (3, 6), random(9, 3, 4), random(9, 3, 4))


@check(2, 3)
def a_batch_that_is_not_finite_moves_nobody(rank, size):
    layer = layer_of(3)
    layer(random(4, 3))
    before = copy.deepcopy(layer.state_dict())
    for bad in (torch.nan, torch.inf, -torch.inf):
        for where in range(size):
            x = random(4, 3)
            if rank == where:
                x[1, 2] = bad
            y = layer(x)
            assert not y[:, 2].isfinite().any()
            for name, values in before.items():
                assert torch.equal(layer.state_dict()[name], values), name
    layer(random(4, 3))
    assert not torch.equal(layer.running_mean, before["running_mean"])
    assert_same_everywhere(layer)


@check(2)
def a_batch_of_one_value_or_none_in_all(rank, size):
    """Nobody knows how many there are in all before the call, so no one raises an error."""
    for shares in ((1, 0), (0, 0)):
        layer = layer_of(3, activation="relu")
        before = copy.deepcopy(layer.state_dict())
        x = part(random(sum(shares), 3), shares, rank).requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))
        assert torch.equal(y, layer.bias.relu().expand_as(y))
        assert torch.equal(x.grad, torch.zeros_like(x))
        for name, values in before.items():
            assert torch.equal(layer.state_dict()[name], values), name


@check(2)
def the_function(rank, size):
    x, dy = random(9, 3, 2), random(9, 3, 2)
    own = part(x, (3, 6), rank).requires_grad_()
    state = bn.State(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), torch.tensor(0))
    y, after = bn.batch_norm(own, state, training=True, process_group="world")
    y.backward(part(dy, (3, 6), rank))
    wide = x.clone().requires_grad_()
    expected, expected_after = bn.batch_norm(wide, state, training=True)
    expected.backward(dy)
    assert_named("y", y, part(expected, (3, 6), rank), F64)
    assert_named("dx", own.grad, part(wide.grad, (3, 6), rank), F64)
    for found, values in zip(after, expected_after, strict=True):
        assert_named("state", found, values, F64)
