"""Transactions: the forward passes inside are one update of the running statistics, or none."""

import copy

import pytest
import torch
from support import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

SIZES = [2, 7, 3, 12]


def warm(layer):
    """Return the layer in float64, its statistics away from where they start."""
    layer = layer.double()
    for _ in range(3):
        layer(torch.randn(16, 3, 2, dtype=torch.float64) * 2 + 1)
    return layer


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_statistics(actual, expected):
    for mine, truth in zip(actual.buffers(), expected.buffers(), strict=True):
        assert_close(mine, truth, torch.float64, "sum")


LAYERS = {
    "theirs": lambda: nn.BatchNorm1d(3),
    "ours": lambda: bn.BatchNorm1d(3, momentum=0.3, activation="relu"),
    "average": lambda: bn.BatchNorm1d(3, momentum=None),
    "ghost": lambda: bn.GhostBatchNorm(3, ghost_size=2),
    "renormalized": lambda: bn.BatchRenorm(3, warmup_batches=0, r_batches=0, d_batches=9),
    "synchronized": lambda: bn.SyncBatchNorm(3),
    "by the running ones": lambda: bn.BatchNorm(3, statistics="running"),
    "no affine": lambda: bn.BatchNorm(3, affine=False, correction=1),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", LAYERS)
def test_micro_batches_of_any_size_and_order_are_one_batch(kind, order):
    layer = warm(LAYERS[kind]())
    whole = copy.deepcopy(layer)
    x = torch.randn(sum(SIZES), 3, 2, dtype=torch.float64) * 3 + 5
    whole(x)
    with bn.transaction(layer):
        for part in x.split(SIZES)[::order]:
            layer(part)
    assert_same_statistics(layer, whole)


def test_the_update_by_hand():
    layer = bn.BatchNorm1d(1, momentum=0.5)
    with bn.transaction(layer):
        for values in ([3.0, 5], [8.0, 9, 11, 24]):
            layer(torch.tensor(values)[:, None])
    assert layer.running_mean.item() == 5  # (0 + 10) / 2
    assert layer.running_var.item() == pytest.approx(28.1)  # (1 + 276 / 5) / 2
    assert layer.num_batches_tracked == 1


def test_masks_count_the_positions_that_are_there():
    layer = warm(bn.BatchNorm1d(3))
    whole = copy.deepcopy(layer)
    x = torch.randn(24, 3, 2, dtype=torch.float64)
    mask = torch.rand(24, 2) < 0.6
    mask[:2] = False  # nothing at all in the first
    whole(x, mask=mask)
    with bn.transaction(layer):
        for part, there in zip(x.split(SIZES), mask.split(SIZES), strict=True):
            layer(part.where(there[:, None], torch.nan), mask=there)
    assert_same_statistics(layer, whole)


def test_each_forward_pass_is_normalized_as_without():
    plain = warm(bn.BatchNorm1d(3))
    layer, before = copy.deepcopy(plain), state(plain)
    with bn.transaction(layer):
        for part in torch.randn(8, 5, 3, dtype=torch.float64):
            leaves = [part.clone().requires_grad_() for _ in range(2)]
            ys = layer(leaves[0]), plain(leaves[1])
            for y, dy in zip(ys, [torch.randn_like(ys[0])] * 2, strict=True):
                y.backward(dy)
            assert_bits(*ys)
            assert_bits(leaves[0].grad, leaves[1].grad)
            assert_bits(state(layer), before)


def test_rollback_leaves_every_bit():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), bn.BatchNorm(3, momentum=None))
    model(torch.randn(8, 3))
    before = state(model)
    with bn.transaction(model) as t:
        model(torch.randn(8, 3) * 1e20)
        t.rollback()
    assert_bits(state(model), before)
    assert type(model[1]) is nn.BatchNorm1d


def test_every_decision_is_about_what_came_since_the_last():
    layer = bn.BatchNorm1d(3)
    expected = copy.deepcopy(layer)
    a, b, c, d = torch.randn(4, 8, 3)
    with bn.transaction(layer) as t:
        layer(a)
        layer(b)
        t.commit()
        t.commit()  # nothing came
        layer(b)
        t.rollback()
        layer(c)
        t.commit()
        layer(d)  # is committed by the end
    for batch in (torch.cat([a, b]), c, d):
        expected(batch)
    torch.testing.assert_close(state(layer), state(expected))
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_rolls_back(error):
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm(3))
    before = state(model)

    def step():
        with bn.transaction(model):
            model(torch.randn(8, 3))
            raise error

    with pytest.raises(error):
        step()
    assert_bits(state(model), before)
    model(torch.randn(8, 3))
    assert model[0].num_batches_tracked == model[1].num_batches_tracked == 1


def test_one_inside_another_is_refused_and_harms_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with bn.transaction(model, where="0"):
        model(torch.randn(8, 3))
        inner = bn.transaction(model)
        with pytest.raises(RuntimeError, match="'0' is in a transaction already"), inner:
            pass
        with bn.transaction(model, where="1") as other:  # which is another
            model(torch.randn(8, 3))
            other.rollback()
    assert [layer.num_batches_tracked.item() for layer in model] == [1, 1]


@pytest.mark.parametrize("tool", ["calibrate", "big_batch"])
def test_tools_that_need_the_statistics_refuse_a_layer_inside(tool):
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    call = {
        "calibrate": lambda: bn.calibrate(layer, [x]),
        "big_batch": lambda: bn.big_batch(layer, [x], lambda model, part: model(part).sum()),
    }[tool]
    with bn.transaction(layer), pytest.raises(RuntimeError, match="is in a transaction"):
        call()
    assert type(layer) is nn.BatchNorm1d


def test_one_object_may_be_entered_again_and_again():
    layer = bn.BatchNorm1d(3)
    t = bn.transaction(layer)
    for batches in (1, 2):
        with t:
            layer(torch.randn(8, 3))
        assert layer.num_batches_tracked == batches


def test_where_may_be_any_iterable():
    model = nn.Sequential(bn.BatchNorm(3), bn.BatchNorm(3))
    t = bn.transaction(model, where=(name for name in ["0"]))
    for _ in range(2):
        with t:
            model(torch.randn(8, 3))
            t.rollback()
    assert [layer.num_batches_tracked.item() for layer in model] == [0, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_micro_batch_that_is_not_finite_is_left_out(bad):
    layer, whole = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    a, b, c = torch.randn(3, 8, 3)
    with bn.transaction(layer):
        for part in (a, b.where(b < 1, bad), c, torch.empty(0, 3)):
            layer(part)
    whole(torch.cat([a, c]))
    torch.testing.assert_close(state(layer), state(whole))


def test_what_would_update_nothing_adds_nothing():
    layers = {
        "evaluation": bn.BatchNorm1d(3).eval(),
        "frozen": bn.FrozenBatchNorm(3),
        "no gradient": bn.BatchNorm1d(3, update="grad"),
        "no statistics": bn.BatchNorm1d(3, track_running_stats=False),
    }
    for name, layer in layers.items():
        before = state(layer)
        with bn.transaction(layer), torch.no_grad():
            layer(torch.randn(8, 3))
        assert_bits(state(layer), before), name


def test_a_step_that_the_gradient_scaler_skips():
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tracked = []
    for size in (1.0, float("inf"), 1.0):  # the second gradient overflows
        optimizer.zero_grad()
        with bn.transaction(model) as t:
            for part in torch.randn(2, 8, 3):
                scaler.scale(model(part).square().mean() * size).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale:
                t.rollback()
        tracked.append(model[1].num_batches_tracked.item())
    assert tracked == [1, 1, 2]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_is_counted_once(use_reentrant):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), bn.BatchNorm(4))
    plain = copy.deepcopy(model)
    x = torch.randn(4, 8, 3, requires_grad=True)
    with bn.transaction(model), bn.transaction(plain):
        for part in x:
            checkpoint(model, part, use_reentrant=use_reentrant).square().mean().backward()
            plain(part)
    torch.testing.assert_close(state(model), state(plain))
    assert model[1].num_batches_tracked == model[3].num_batches_tracked == 1


def test_a_compiled_model_gives_the_same_and_is_compiled_a_few_times_only():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), bn.GhostBatchNorm(4, ghost_size=3))
    eager = copy.deepcopy(model)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for round_ in range(4):
        parts = torch.randn(3, 8, 3)
        parts[1, 0] = float("nan") if round_ == 1 else 0
        for module in (compiled, eager):
            with bn.transaction(module) as t:
                for part in parts:
                    module(part).square().mean().backward()
                if round_ == 2:
                    t.rollback()
    torch.testing.assert_close(state(model), state(eager))
    assert model[1].num_batches_tracked == 3
    assert counted.frame_count <= 4


def test_a_commit_from_within_the_backward_pass_counts():
    layer = bn.BatchNorm1d(3)
    with bn.transaction(layer) as t:
        y = layer(torch.randn(8, 3))
        y.register_hook(lambda _: t.commit())
        y.square().sum().backward()
    assert layer.num_batches_tracked == 1


def test_a_copy_made_inside_is_outside():
    layer = nn.BatchNorm1d(3)
    with bn.transaction(layer):
        layer(torch.randn(8, 3))
        twin = copy.deepcopy(layer)
        twin(torch.randn(8, 3))
    assert layer.num_batches_tracked == twin.num_batches_tracked == 1


def test_banks_have_a_transaction_each():
    layer = bn.BankedBatchNorm(3, banks=("a", "b"))
    a, b = torch.randn(2, 8, 3)
    with bn.transaction(layer):
        layer(torch.cat([a, b]), domain=torch.arange(16) // 8)
        layer(b, domain="b")
    whole = bn.BatchNorm(3)
    whole(torch.cat([b, b]))
    torch.testing.assert_close(state(layer["b"]), state(whole))
    assert layer["a"].num_batches_tracked == 1


def uncounted():
    layer = bn.BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked = None
    return layer


def test_where_one_layer_cannot_follow_none_does():
    model = nn.Sequential(bn.BatchNorm1d(3), uncounted())
    before = state(model)
    with pytest.raises(ValueError, match="'1' cannot follow: momentum=None"), bn.transaction(model):
        raise AssertionError
    model[1].momentum = 0.1
    with bn.transaction(model) as t:
        model(torch.randn(8, 3))
        model[1].momentum = None
        with pytest.raises(ValueError, match="'1' cannot follow: momentum=None"):
            t.commit()
        assert_bits(state(model), before)
        t.rollback()
    assert bn.transaction(model.eval()).__enter__().rollback() is None  # where nothing follows


def test_what_was_frozen_inside_stays():
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm1d(3))
    before = state(model[0])
    with bn.transaction(model):
        model(torch.randn(8, 3))
        bn.freeze(model, where="0")
    assert_bits(state(model[0]), before)
    assert model[1].num_batches_tracked == 1


def test_a_micro_batch_whose_variance_the_statistics_cannot_hold_is_left_out():
    layer, whole = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    a, b, c = torch.randn(3, 8, 3)
    with bn.transaction(layer):
        for part in (a, b * 1e25, c):
            layer(part)
    whole(torch.cat([a, c]))
    torch.testing.assert_close(state(layer), state(whole))
