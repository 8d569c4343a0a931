"""Checks of the tools for whole models that know of other processes."""

import torch
import torch.distributed as dist
from ranks.batches import (
    GATHER,
    STATISTICS,
    assert_named,
    assert_same_everywhere,
    counted,
    fails,
    part,
)
from ranks.processes import check
from ranks.values import random
from torch import nn

import batchnorm as bn

F64 = torch.float64


def stock_model():
    """Return a model of torch.nn alone, the same on all ranks."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)
    ).double()


def assert_same_statistics(model, whole):
    """Assert that a model has the running statistics of another, and so on all ranks."""
    expected = whole.state_dict()
    for name, values in model.state_dict().items():
        if name.endswith(STATISTICS):
            assert_named(name, values, expected[name], F64, times=10)
    assert_same_everywhere(model)


@check(2, 3)
def a_model_is_synchronized_and_made_local_again(rank, size):
    shares = tuple(range(1, size + 1))
    model, whole = stock_model(), stock_model()
    x = random(sum(shares), 2, 6, 6)
    assert bn.synchronize(model).done == ["1", "3"]
    for _ in range(2):
        assert_named("y", model(part(x, shares, rank)), part(whole(x), shares, rank), F64, 10)
    assert_same_statistics(model, whole)
    bn.assert_statistics_agree(model)
    bn.unsynchronize(model)
    assert type(model[1]) is nn.BatchNorm2d
    with counted() as calls:
        model(part(x, shares, rank))
    assert calls == []
    bn.synchronize(model)
    with counted() as calls:
        model(part(x, shares, rank))
    assert calls == [GATHER] * 4  # the processes may be others: they shake hands again


@check(2, 3)
def statistics_of_ranks_that_differ_are_told_and_reduced(rank, size):
    model = stock_model()
    for _ in range(rank + 1):
        model(random(5, 2, 6, 6, mean=3.0 * rank))
    words = "'1'", "bn.reduce_statistics", "ranks 1, 2" if size == 3 else "rank 1 "
    fails(lambda: bn.assert_statistics_agree(model), RuntimeError, *words)
    every = [None] * size
    dist.all_gather_object(every, model.state_dict())
    share = torch.arange(1.0, size + 1, dtype=F64)
    share = (share / share.sum())[:, None]
    with counted() as calls:
        report = bn.reduce_statistics(model)
    assert calls == [GATHER] * 2
    assert report.done == ["1", "3"]
    assert report.spread > 0.1
    for name in ("1", "3"):
        means, variances = (
            torch.stack([state[f"{name}.running_{kind}"] for state in every])
            for kind in ("mean", "var")
        )
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        assert_named("mean", model.get_buffer(f"{name}.running_mean"), mean, F64)
        assert_named("var", model.get_buffer(f"{name}.running_var"), var, F64)
    bn.assert_statistics_agree(model)


@check(2, 3)
def calibration_of_data_that_lie_on_all_ranks(rank, size):
    batches = [random(3 + i, 2, 6, 6, mean=float(i)) for i in range(5)]
    own = [batches[:1], batches[1:], []][rank]  # the third has none
    for sequential in (False, True):
        model, whole = stock_model(), stock_model()
        bn.calibrate(whole, batches, sequential=sequential)
        bn.calibrate(model, own, sequential=sequential, process_group="world")
        assert_same_statistics(model, whole)
        assert model[1].num_batches_tracked == 5


@check(2)
def a_transaction_of_synchronized_layers(rank, size):
    model, whole = stock_model(), stock_model()
    bn.synchronize(model)
    first, second = random(5, 2, 6, 6), random(7, 2, 6, 6, mean=2.0)
    with bn.transaction(model), bn.transaction(whole):
        for x, shares in ((first, (3, 2)), (second, (1, 6))):
            model(part(x, shares, rank))
            whole(x)
    assert_same_statistics(model, whole)
    assert model[1].num_batches_tracked == 1
    with bn.transaction(model) as t:
        model(part(first, (3, 2), rank))
        t.rollback()
    assert_same_statistics(model, whole)
