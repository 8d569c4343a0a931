"""`BatchRenorm`: its schedule, and what a recomputation must not see."""

import copy
import io

import numpy as np
import pytest
import torch
from support import (
    FLOATS,
    LAYOUTS,
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

#: No warm-up, so that there is something to correct from the first batch on.
NOW = {"warmup_batches": 0, "r_batches": 0, "d_batches": 0}
SHORT = {"warmup_batches": 2, "r_batches": 10, "d_batches": 6}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_training_equals_the_reference_step_by_step(dtype, layout, masked):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = bn.BatchRenorm(
        5, eps=0.1, channel_dim=channel_dim, activation="gelu", dtype=wide,
        **{"warmup_batches": 1, "r_batches": 3, "d_batches": 2},
    )  # fmt: skip
    mask = weights_of(shape, channel_dim) if masked else None
    running = np.zeros(5), np.ones(5)
    for limits in [(1, 0), (1, 0), (2, 5), (3, 5)]:
        inputs = make(shape, channel_dim, memory_format, dtype)
        options = {"eps": 0.1, "axis": channel_dim, "weights": mask}
        expected = expected_step(*inputs, "gelu", **options, running=running, renorm=limits)
        assert_steps_close(layer_step(layer, *inputs, mask=mask), expected, dtype)
        running = expected_running(running, inputs[0], axis=channel_dim, weights=mask)
    assert_close(layer.running_mean, running[0], wide, "sum")
    assert_close(layer.running_var, running[1], wide, "sum")


class TestSchedule:
    def test_is_that_of_the_paper(self):
        layer, found = bn.BatchRenorm(1), {}
        for batches in (0, 5_000, 15_000, 22_500, 25_000, 40_000, 90_000):
            layer.num_batches_tracked.fill_(batches)
            found[batches] = tuple(v.item() for v in layer.limits())
        r = 1 + 2 * (10_000 / 35_000)
        assert found[0] == found[5_000] == (1, 0)
        assert found[15_000] == (pytest.approx(r), 2.5)
        assert found[22_500] == (2, pytest.approx(5 * 17_500 / 20_000))
        assert found[25_000] == (pytest.approx(1 + 2 * (20_000 / 35_000)), 5)
        assert found[40_000] == found[90_000] == (3, 5)

    def test_counts_only_what_updated_the_statistics(self):
        layer = bn.BatchRenorm(3, **SHORT)
        layer(torch.randn(8, 3))
        layer(torch.full((8, 3), torch.nan))
        layer(torch.empty(0, 3))
        layer.eval()(torch.randn(8, 3))
        layer.train()
        layer.update = "never"
        layer(torch.randn(8, 3))
        assert layer.num_batches_tracked == 1

    def test_a_jump_where_it_has_no_length(self):
        layer = bn.BatchRenorm(1, warmup_batches=2, r_batches=2, d_batches=2, r_max=4, d_max=1)
        found = []
        for batches in (0, 1, 2, 3):
            layer.num_batches_tracked.fill_(batches)
            found.append(tuple(v.item() for v in layer.limits()))
        assert found == [(1, 0), (1, 0), (4, 1), (4, 1)]

    @pytest.mark.parametrize("assign", [False, True])
    def test_goes_on_where_a_state_dict_was_saved(self, assign):
        batches = torch.randn(12, 8, 3) * 2 + torch.linspace(0, 3, 12).view(-1, 1, 1)
        whole = bn.BatchRenorm(3, momentum=0.3, **SHORT)
        ys = [whole(x) for x in batches]
        first = bn.BatchRenorm(3, momentum=0.3, **SHORT)
        for x in batches[:5]:
            first(x)
        stream = io.BytesIO()
        torch.save(first.state_dict(), stream)
        stream.seek(0)
        second = bn.BatchRenorm(3, momentum=0.3, **SHORT)
        second.load_state_dict(torch.load(stream), assign=assign)
        for x, y in zip(batches[5:], ys[5:], strict=True):
            assert torch.equal(second(x), y)
        torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
        plain = bn.BatchNorm(3)  # the correction was not nothing
        assert not torch.allclose(plain(batches[-1]), ys[-1], atol=0.1)

    def test_a_state_dict_is_that_of_torch(self):
        layer = bn.BatchRenorm(3)
        assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
        layer.load_state_dict(nn.BatchNorm1d(3).state_dict())


def test_evaluation_is_that_of_batch_norm_and_what_training_came_to():
    layer, x = bn.BatchRenorm(3, r_max=1e3, d_max=1e3, **NOW), torch.randn(8, 3) * 2 + 1
    expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), expected)  # the statistics moved after that
    plain = bn.BatchNorm(3).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))


def test_small_batches_go_as_the_setting_says():
    layer = bn.BatchRenorm(3, on_small_batch="running", **NOW)
    x = torch.randn(1, 3)
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))
    with pytest.raises(ValueError, match=r"more than 1 value .*BatchRenorm"):
        bn.BatchRenorm(3, **NOW)(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"track_running_stats": False}, "needs track_running_stats=True"),
        ({"r_max": 0.5}, "expected r_max >= 1"),
        ({"d_max": -1.0}, "d_max >= 0"),
        ({"r_max": float("nan")}, "expected r_max >= 1"),
        ({"warmup_batches": -1}, "expected 0 <= warmup_batches"),
        ({"warmup_batches": 30_000}, "neither of the others below it"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        bn.BatchRenorm(3, **settings)


def test_repr():
    assert repr(bn.BatchRenorm(3, r_max=2.0)).endswith(
        "track_running_stats=True, r_max=2.0, d_max=5.0)"
    )


def twins(**settings):
    """Return a model and its copy, whose layer corrects much and has seen other data."""
    model = nn.Sequential(nn.Linear(3, 5), bn.BatchRenorm(5, momentum=0.5, **NOW, **settings))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.1, 3)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
class TestCheckpoint:
    def check(self, plain, checkpointed):
        torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict())
        for mine, truth in zip(checkpointed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, truth.grad)

    @pytest.mark.parametrize("ghost_size", [None, 3])
    def test_gradients_are_those_without_and_there_is_one_update(self, use_reentrant, ghost_size):
        plain, checkpointed = twins(ghost_size=ghost_size)
        for _ in range(3):
            x, dy = torch.randn(8, 3, requires_grad=True), torch.randn(8, 5)
            plain(x).backward(dy)
            checkpoint(checkpointed, x, use_reentrant=use_reentrant).backward(dy)
        assert checkpointed[1].num_batches_tracked == 3
        self.check(plain, checkpointed)

    def test_several_calls_before_one_backward_pass_also_of_one_batch(self, use_reentrant):
        plain, checkpointed = twins()
        xs = torch.randn(3, 8, 3)[[0, 1, 0, 2, 0]].requires_grad_()
        dys = torch.randn(5, 8, 5)
        losses = [
            sum((call(x) * dy).sum() for x, dy in zip(xs, dys, strict=True))
            for call in (
                plain,
                lambda x: checkpoint(checkpointed, x, use_reentrant=use_reentrant),
            )
        ]
        for loss in losses:
            loss.backward()
        self.check(plain, checkpointed)

    def test_a_batch_that_is_not_finite_is_recomputed_like_any_other(self, use_reentrant):
        model, _ = twins()
        x = torch.randn(8, 3)
        x[1, 1] = torch.nan
        y = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
        y.backward(torch.randn(8, 5))
        assert x.grad.isnan().any()

    def test_a_call_that_is_long_ago_says_so(self, use_reentrant):
        layer = bn.BatchRenorm(3, **NOW)
        x = torch.randn(8, 3, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        for _ in range(32):
            layer(torch.randn(8, 3))
        with pytest.raises(RuntimeError, match="not among the last 32"):
            y.backward(torch.randn(8, 3))


def test_what_is_remembered_goes_into_no_copy():
    layer, stream = bn.BatchRenorm(3, **NOW), io.BytesIO()
    layer(torch.randn(8, 3))
    assert len(layer._recent) == 1
    torch.save(layer, stream)
    stream.seek(0)
    x = torch.randn(8, 3)
    for twin in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert len(twin._recent) == 0
        torch.testing.assert_close(twin.state_dict(), layer.state_dict())
        checkpoint(twin, x, use_reentrant=False)
        assert len(twin._recent) == 1
    assert len(layer._recent) == 1


def test_transforms_leave_nothing_behind():
    layer = bn.BatchRenorm(3, update="never", **NOW)
    x = torch.randn(4, 8, 3)
    expected = torch.stack([layer(part) for part in x])
    layer._recent = type(layer._recent)()
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    torch.func.jvp(layer, (x[0],), (x[1],))
    torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))(x)
    assert len(layer._recent) == 0


def compiled_step(function, x, dy):
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return y, *torch.autograd.grad(y, leaf, dy)


def test_a_full_graph_gives_the_same_through_the_schedule():
    torch._dynamo.reset()
    eager = bn.BatchRenorm(
        3, momentum=0.5, activation="relu", warmup_batches=1, r_batches=3, d_batches=2
    )
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x, dy = torch.randn(10, 3, 4) * 3 + 1, torch.randn(10, 3, 4)
        torch.testing.assert_close(compiled_step(compiled, x, dy), compiled_step(eager, x, dy))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    # what it was corrected by is not there any more: an error, and no wrong gradient
    y = checkpoint(compiled, torch.randn(10, 3, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match="recomputes BatchRenorm in compiled code"):
        y.backward(torch.randn(10, 3, 4))
