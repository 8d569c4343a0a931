"""The three settings of a layer: what normalizes, when the statistics follow, what is trained."""

import contextlib
import copy
import io
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from support import (
    BACKENDS,
    as_numpy,
    assert_close,
    assert_steps_close,
    expected_running,
    expected_step,
    layer_step,
    make,
    weights_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import Moments
from batchnorm.layers import Ledger

STATISTICS = ("mode", "batch", "running")
UPDATES = ("training", "grad", "always", "never")


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ghost_size", [None, 3])
def test_what_normalizes_and_what_follows(
    statistics, update, training, backend, masked, ghost_size
):
    by_batch = {"mode": training, "batch": True, "running": False}[statistics]
    layer = bn.BatchNorm(
        5, statistics=statistics, update=update, ghost_size=ghost_size, activation="tanh", eps=0.1
    ).double()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    layer.train(training)
    mask = weights_of((7, 5, 4), 1) if masked else None
    options = {"weights": mask, "eps": 0.1, "ghost_size": ghost_size}
    inputs = make((7, 5, 4), 1, torch.contiguous_format, torch.float64)
    for recorded in (True, False):
        before = [v.clone() for v in (layer.running_mean, layer.running_var)]
        counted = layer.num_batches_tracked.item()
        if not by_batch:
            options["running"] = [as_numpy(v) for v in before]
        expected = expected_step(*inputs, "tanh", **options)
        with bn.backend(backend):
            if recorded:
                assert_steps_close(layer_step(layer, *inputs, mask=mask), expected, torch.float64)
            else:
                with torch.no_grad():
                    y = layer(inputs[0], inputs[3], mask)
                assert_close(y, expected[0], torch.float64)
        follows = {"always": True, "never": False, "training": training}
        moved = follows.get(update, training and recorded)
        truth = expected_running(before, inputs[0], weights=mask) if moved else before
        assert layer.num_batches_tracked == counted + moved
        assert_close(layer.running_mean, truth[0], torch.float64, "sum")
        assert_close(layer.running_var, truth[1], torch.float64, "sum")


@pytest.mark.parametrize("trained", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_what_is_trained_is_what_requires_a_gradient(trained, statistics):
    layer = bn.BatchNorm(5, statistics=statistics, activation="relu")
    inputs = make((7, 5), 1, torch.contiguous_format, torch.float32)
    twin = copy.deepcopy(layer)
    _, dx, *expected, _ = layer_step(twin, *inputs)
    layer.load_state_dict({**layer.state_dict(), "weight": inputs[1], "bias": inputs[2]})
    for parameter, asked in zip(layer.parameters(), trained, strict=True):
        parameter.requires_grad_(asked)
    x = inputs[0].clone().requires_grad_()
    layer(x, inputs[3]).backward(inputs[4])
    torch.testing.assert_close(x.grad, dx)
    for parameter, asked, truth in zip(layer.parameters(), trained, expected, strict=True):
        assert (parameter.grad is not None) == asked
        if asked:
            torch.testing.assert_close(parameter.grad, truth)


def test_without_running_statistics_the_batch_always_normalizes_and_nothing_follows():
    x = torch.randn(8, 5)
    expected = bn.batch_norm(x, training=True)
    for statistics, update in itertools.product(("mode", "batch"), UPDATES):
        layer = bn.BatchNorm(5, statistics=statistics, update=update, track_running_stats=False)
        for training in (True, False):
            torch.testing.assert_close(layer.train(training)(x), expected)
        assert not list(layer.buffers())


def test_a_batch_of_one_normalized_by_the_running_statistics_needs_no_other():
    layer = bn.BatchNorm(5, statistics="running")
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.randn(1, 5)).shape == (1, 5)
    torch.testing.assert_close(layer.state_dict(), before)  # one value has no variance
    assert layer(torch.randn(1, 5, 2)).shape == (1, 5, 2)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics": "batches"}, "'batches': expected one of 'mode', 'batch', 'running'"),
        ({"update": True}, "update is True: expected one of 'training', 'grad'"),
        ({"statistics": "running", "track_running_stats": False}, "track_running_stats=True"),
        ({"half_life_batches": -1}, "half-life is -1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        bn.BatchNorm(5, **settings)


class TestHalfLife:
    @pytest.mark.parametrize("batches", [1, 6.6, 100])
    def test_is_a_momentum(self, batches):
        layer = bn.BatchNorm2d(3, half_life_batches=batches)
        assert layer.momentum == pytest.approx(1 - 2 ** (-1 / batches))
        assert layer.half_life_batches == pytest.approx(batches)
        assert "momentum=" in repr(layer)

    def test_after_so_many_batches_half_is_forgotten(self):
        layer = bn.BatchNorm(1, half_life_batches=4, dtype=torch.float64)
        ones = torch.ones(8, 1, dtype=torch.float64)
        for _ in range(4):
            layer(ones)
        torch.testing.assert_close(layer.running_mean, torch.full((1,), 0.5).double())
        torch.testing.assert_close(layer.running_var, torch.full((1,), 0.5).double())

    def test_follows_the_momentum(self):
        layer = bn.BatchNorm(3)
        assert layer.half_life_batches == pytest.approx(6.5788, abs=1e-4)
        layer.momentum = None
        assert layer.half_life_batches is None
        layer.momentum = 0.0
        assert layer.half_life_batches == math.inf


def test_repr_says_what_is_not_the_default():
    layer = bn.BatchNorm(3, ghost_size=8, process_group="world", statistics="batch", update="grad")
    assert repr(layer).endswith(
        "track_running_stats=True, ghost_size=8, process_group='world', statistics='batch', "
        "update='grad')"
    )
    assert repr(bn.SyncBatchNorm(3)).endswith("process_group='world')")


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_a_copy_is_in_the_same_process_group():
    group = dist.new_group([0])
    for layer in (bn.BatchNorm(3, process_group=group), bn.SyncBatchNorm(3, process_group=group)):
        model = nn.Sequential(nn.Linear(3, 3), layer)
        twin = copy.deepcopy(model)
        assert twin[1].process_group is group
        assert twin[1].weight is not layer.weight
        assert repr(layer).endswith("process_group='1 processes')")
        x = torch.randn(8, 3)
        assert torch.equal(twin(x), model(x))
        torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    both = copy.deepcopy([layer, layer])
    assert both[0] is both[1]


def test_a_group_of_no_processes_is_the_batch_alone():
    x = torch.randn(8, 3)
    for layer in (bn.SyncBatchNorm(3), bn.BatchNorm(3, process_group="world")):
        assert torch.equal(layer(x), bn.BatchNorm(3)(x))


def test_settings_survive_copies_and_are_no_state():
    layer = bn.BatchNorm(3, ghost_size=4, statistics="batch", update="never", half_life_batches=9)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert repr(twin) == repr(layer)
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())


def test_a_layer_saved_before_there_were_settings_has_the_defaults():
    layer = bn.BatchNorm(3)
    for name in ("ghost_size", "process_group", "statistics", "update"):
        del layer.__dict__[name]
    x = torch.randn(8, 3)
    assert torch.equal(layer(x), bn.BatchNorm(3)(x))
    assert repr(layer) == repr(bn.BatchNorm(3))


@pytest.mark.parametrize("update", ["training", "grad", "always"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_checkpoint_updates_once(update, use_reentrant, statistics):
    layer = bn.BatchNorm(3, statistics=statistics, update=update, ghost_size=3)
    twin, x = copy.deepcopy(layer), torch.randn(8, 3, requires_grad=True)
    dy = torch.randn(8, 3)
    (expected,) = torch.autograd.grad(twin(x), x, dy)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    if statistics == "running":
        with pytest.raises(RuntimeError, match="the running statistics have moved since"):
            y.backward(dy)
        return
    y.backward(dy)
    torch.testing.assert_close(x.grad, expected)
    if use_reentrant and update == "grad":  # its first pass is under no_grad, as a probe is
        assert layer.num_batches_tracked == 0
    else:
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())


class TestLedger:
    @pytest.mark.parametrize(
        "settings", [{}, {"ghost_size": 3}, {"statistics": "running"}], ids=str
    )
    def test_collects_the_moments_that_would_be_followed(self, settings):
        layer = bn.BatchNorm(3, **settings)
        before = copy.deepcopy(layer.state_dict())
        layer.ledger = Ledger()
        batches = torch.randn(4, 8, 3) + 5
        for x in batches:
            layer(x)
        layer(torch.full((8, 3), torch.nan))
        layer(torch.empty(0, 3))
        layer.eval()(torch.randn(8, 3))
        whole = Moments.of(batches.flatten(0, 1))
        assert float(layer.ledger.total.count) == whole.count
        torch.testing.assert_close(layer.ledger.total.mean, whole.mean, rtol=1e-7, atol=0)
        torch.testing.assert_close(layer.ledger.total.m2, whole.m2, rtol=1e-6, atol=0)
        assert layer.ledger.batches == 4
        torch.testing.assert_close(layer.state_dict(), before)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_recomputation_adds_nothing(self, use_reentrant):
        layer = bn.BatchNorm(3)
        layer.ledger = Ledger()
        x = torch.randn(8, 3, requires_grad=True)
        checkpoint(layer, x, use_reentrant=use_reentrant).backward(torch.randn(8, 3))
        assert (float(layer.ledger.total.count), int(layer.ledger.batches)) == (8, 1)

    def test_is_empty_where_nothing_ran(self):
        ledger = Ledger()
        assert (ledger.total, ledger.batches) == (None, 0)
        layer = bn.BatchNorm(3)
        layer.ledger = ledger
        with contextlib.suppress(ValueError):
            layer(torch.randn(1, 3))
        assert ledger.total is None


def test_statistics_that_follow_are_those_of_what_came_in_though_it_is_overwritten():
    x = torch.randn(8, 3) * 3 + 5
    mean, var = x.mean(0), x.var(0)
    settings = {"inplace": True, "statistics": "running", "update": "always", "momentum": 1.0}
    layer = bn.BatchNorm(3, activation="relu", **settings)
    with torch.no_grad():
        assert layer(x) is x
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_one_value_normalized_by_what_has_moved_since_is_not_recomputed(use_reentrant):
    layer = bn.BatchNorm(3, on_small_batch="running", momentum=0.5)
    layer(torch.randn(8, 3))
    x = torch.randn(1, 3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    layer(torch.randn(8, 3) + 3)
    with pytest.raises(RuntimeError, match="the running statistics have moved since"):
        y.square().sum().backward()


def test_statistics_that_a_tool_cast_are_float32_again():
    layer, twin, x = bn.BatchNorm(3), bn.BatchNorm(3), torch.randn(8, 3)
    for buffer in (layer.running_mean, layer.running_var):
        buffer.data = buffer.data.bfloat16()  # as FSDP does with buffer_dtype
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_momentum_and_half_life_say_the_same_thing():
    with pytest.raises(ValueError, match="give one of them"):
        bn.BatchNorm(3, momentum=0.5, half_life_batches=3)
