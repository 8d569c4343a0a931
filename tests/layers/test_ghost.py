"""`GhostBatchNorm`: groups as a setting, in training, evaluation, copies and checkpoints."""

import copy

import numpy as np
import pytest
import torch
from support import (
    BACKENDS,
    FLOATS,
    LAYOUTS,
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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_equals_the_reference(dtype, layout, masked):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = bn.GhostBatchNorm(
        5, eps=0.1, ghost_size=3, channel_dim=channel_dim, activation="gelu", dtype=wide
    )
    mask = weights_of(shape, channel_dim) if masked else None
    running = np.zeros(5), np.ones(5)
    options = {"eps": 0.1, "ghost_size": 3, "axis": channel_dim, "weights": mask}
    for _ in range(2):
        inputs = make(shape, channel_dim, memory_format, dtype)
        found = layer_step(layer, *inputs, mask=mask)
        assert_steps_close(found, expected_step(*inputs, "gelu", **options), dtype)
        running = expected_running(running, inputs[0], axis=channel_dim, weights=mask)
    assert layer.num_batches_tracked == 2
    assert_close(layer.running_mean, running[0], wide, "sum")
    assert_close(layer.running_var, running[1], wide, "sum")


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_is_that_of_batch_norm(backend):
    layer, whole = bn.GhostBatchNorm(3, ghost_size=4), bn.BatchNorm(3)
    with bn.backend(backend):
        for _ in range(3):
            x = torch.randn(10, 3, 4) + 2
            layer(x), whole(x)
        torch.testing.assert_close(layer.state_dict(), whole.state_dict())
        whole.load_state_dict(layer.state_dict())
        assert torch.equal(layer.eval()(x), whole.eval()(x))
        one = x[:1]  # alone it is predicted as among others
        assert torch.equal(layer(one), layer(x)[:1])


def test_without_running_statistics_the_groups_normalize_in_evaluation_too():
    layer, x = bn.GhostBatchNorm(3, track_running_stats=False, ghost_size=4), torch.randn(10, 3)
    y = layer(x)
    assert torch.equal(layer.eval()(x), y)
    torch.testing.assert_close(y[:4], bn.BatchNorm(3)(x[:4]))


def test_every_layer_has_the_setting():
    x = torch.randn(8, 3, 4, 4)
    expected = bn.GhostBatchNorm(3, ghost_size=2)(x)
    layer = bn.BatchNorm2d(3, ghost_size=2)
    assert torch.equal(layer(x), expected)
    layer.ghost_size = None  # as a schedule would
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))


def test_repr_and_what_is_refused():
    assert repr(bn.GhostBatchNorm(3)).endswith("track_running_stats=True, ghost_size=32)")
    for size in (0, -4, 2.0, "8", False):
        with pytest.raises(ValueError, match="ghost_size is"):
            bn.GhostBatchNorm(3, ghost_size=size)


def test_an_error_names_the_layer_and_the_groups():
    model = nn.Sequential(nn.Linear(3, 3), bn.GhostBatchNorm(3, ghost_size=1))
    with pytest.raises(ValueError, match=r"in groups of 1: .*\[in '1' of Sequential: GhostBatch"):
        model(torch.randn(4, 3))


def test_a_setting_and_statistics_survive_a_copy():
    layer = bn.GhostBatchNorm(3, ghost_size=4)
    layer(torch.randn(9, 3))
    twin, x = copy.deepcopy(layer), torch.randn(9, 3)
    assert twin.ghost_size == 4
    assert torch.equal(twin(x), layer(x))
    torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_under_checkpoint_updates_nothing(use_reentrant):
    plain = nn.Sequential(nn.Linear(3, 5), bn.GhostBatchNorm(5, ghost_size=3, activation="relu"))
    checkpointed = copy.deepcopy(plain)
    for _ in range(3):
        x, dy = torch.randn(8, 3, requires_grad=True), torch.randn(8, 5)
        plain(x).backward(dy)
        checkpoint(checkpointed, x, use_reentrant=use_reentrant).backward(dy)
    assert checkpointed[1].num_batches_tracked == 3
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict())
    for ours, expected in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_functional_call_and_vmap_over_models():
    models = [bn.GhostBatchNorm(3, ghost_size=3) for _ in range(2)]
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 8, 3)

    def call(params, buffers, x):
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    expected = torch.stack([copy.deepcopy(m)(part) for m, part in zip(models, x, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(params, buffers, x), expected)
    assert buffers["num_batches_tracked"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_statistics_wide(dtype):
    layer, x = bn.GhostBatchNorm(3, ghost_size=8), torch.randn(32, 3) + 1
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x.to(dtype))
    assert y.dtype == dtype
    running = expected_running((np.zeros(3), np.ones(3)), as_numpy(x.to(dtype)))
    assert_close(layer.running_mean, running[0], torch.float32, "sum")
