"""What users of batch normalization suffer from: shown first with torch, and then gone here.

One test a row of the table of requirements; rows about other tools are tested beside these. The
words in quotes are the users'.
"""

import copy

import pytest
import torch
from models.gathering import over_processes
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.conventions import from_keras

BOTH = (nn, bn)


def network(library):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), library.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def test_row_02_the_last_batch_may_have_one_example():
    """Of the last batch: "Expected more than 1 value per channel"."""
    last = torch.randn(1, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as fault:
        network(nn)(last)
    assert "Sequential" not in str(fault.value)
    with pytest.raises(ValueError, match=r"Expected more than 1 .*\n?.*\[in '1' of Sequential"):
        network(bn)(last)
    for choice in ("running", "skip"):
        layer = bn.BatchNorm1d(3, on_small_batch=choice)
        layer(torch.randn(8, 3))
        assert layer(last).isfinite().all()
        assert layer.num_batches_tracked == 1


def test_row_03_frozen_statistics_do_not_move():
    """They say: "I froze BN and its statistics still move"."""
    model = network(nn)
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    model[1].eval()
    model.train()  # as every training loop does
    model(torch.randn(8, 3))
    assert model[1].num_batches_tracked == 1
    bn.freeze(model)
    model.train()
    before = model[1].running_mean.clone()
    model(torch.randn(8, 3))
    assert torch.equal(model[1].running_mean, before)
    assert not any(p.requires_grad for p in model[1].parameters())
    assert bn.unfreeze(model).done == ["1"]


def test_row_04_synchronized_on_one_cpu_and_undone(tmp_path):
    """They say: "SyncBN fails on CPU or one GPU, and cannot be undone"."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        model, x = network(nn), torch.randn(8, 3)
        expected = copy.deepcopy(model)(x)
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))(x)
        bn.synchronize(model)
        torch.testing.assert_close(model(x), expected)
        bn.unsynchronize(model)
        assert type(model[1]) is nn.BatchNorm1d
        theirs = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        bn.unsynchronize(theirs)
        theirs(x)
    finally:
        torch.distributed.destroy_process_group()


def test_row_05_averaged_weights_get_their_own_statistics():
    """They say: "EMA, SWA, Schedule-Free evaluate with the wrong buffers; `update_bn` is too
    opinionated"."""
    model, x = network(nn), 5 * torch.randn(32, 3) + 9
    batches, average = [{"input": part} for part in x.split(8)], AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for batch in batches:
        model(**batch).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    norm, linear = average.eval().module[1], average.module[0]
    assert torch.equal(norm.running_var, model[1].running_var)  # of other weights
    with pytest.raises((TypeError, AttributeError)):
        update_bn(batches, average)  # it cannot call the model
    assert average.training  # and leaves it in another mode
    assert norm.momentum is None  # and with another momentum
    norm.momentum = 0.1
    report = bn.calibrate(average.eval(), batches, call=lambda m, batch: m.module(**batch))
    assert report.done == ["module.1"]
    torch.testing.assert_close(norm.running_var, linear(x).var(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_mean, linear(x).mean(0), rtol=1e-4, atol=1e-6)
    assert not average.training


def test_row_06_two_forwards_and_one_backward():
    """They say: "DDP, two forwards, one backward: modified by an inplace operation"."""
    for library in BOTH:
        model, x = network(library), torch.randn(2, 8, 3)
        first = model(x[0])
        model[1].running_mean.copy_(torch.zeros(4))  # what DDP does to buffers before a forward
        loss = (first * model(x[1])).mean()
        if library is nn:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())


def test_row_07_a_skipped_step_leaves_the_statistics_finite():
    """They say: "GradScaler skipped the step, yet running_mean is NaN"."""

    def step(model, x, size=1.0):
        scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.1)
        before = model[0].weight.clone()
        scaler.scale(model(x).mean() * size).backward()
        scaler.step(optimizer)
        assert torch.equal(model[0].weight, before)  # it was skipped

    overflow = torch.full((8, 3), float("inf"))
    stock, model = network(nn), network(bn)
    before = copy.deepcopy(model.state_dict())
    step(stock, overflow)
    assert stock[1].running_mean.isnan().all()
    step(model, overflow)
    with bn.transaction(model) as transaction:
        step(model, torch.randn(8, 3), size=float("inf"))  # in the gradient alone
        transaction.rollback()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_row_09_padding_stays_out():
    """They say: "padding corrupts the statistics"."""
    lengths = torch.tensor([10, 2, 5])
    there = torch.arange(10) < lengths[:, None]
    values = torch.randn(3, 4, 10) + 6
    padded = values.where(there[:, None], 0)
    valid = values.transpose(1, 2)[there]
    stock = nn.BatchNorm1d(4, momentum=1.0)
    stock(padded)
    assert (stock.running_mean - valid.mean(0)).abs().min() > 2
    for layer in (
        bn.BatchNorm1d(4, momentum=1.0),
        bn.GhostBatchNorm(4, momentum=1.0, ghost_size=2),
        bn.SyncBatchNorm(4, momentum=1.0),
        bn.BatchRenorm(4, momentum=1.0),
    ):
        layer(padded, mask=there)
        torch.testing.assert_close(layer.running_mean, valid.mean(0))
        torch.testing.assert_close(layer.running_var, valid.var(0))


def test_row_10_accumulation_as_a_big_batch():
    """They say: "gradient accumulation is not a big batch"."""
    x = torch.randn(16, 3) + torch.arange(16)[:, None]

    def loss(model, part):
        return model(part).square().sum() / 16

    whole, pooled, exact, stock = (network(library) for library in (nn, bn, bn, nn))
    loss(whole, x).backward()
    with bn.transaction(pooled):
        for part in x.split(4):
            loss(stock, part).backward()
            loss(pooled, part).backward()
    bn.big_batch(exact, x.split(4), loss)
    variances = [m[1].running_var for m in (whole, stock, pooled, exact)]
    gradients = [m[3].weight.grad for m in (whole, stock, pooled, exact)]
    assert (variances[1] < 0.8 * variances[0]).all()
    assert (gradients[1] - gradients[0]).norm() > 0.2 * gradients[0].norm()
    torch.testing.assert_close(variances[2:], [variances[0]] * 2)
    torch.testing.assert_close(gradients[2], gradients[1])  # pooling alone does not give this
    torch.testing.assert_close(gradients[3], gradients[0], rtol=1e-4, atol=1e-5)


def test_row_12_a_checkpoint_updates_once():
    """They say: "activation checkpointing updates the statistics twice"."""
    x = torch.randn(8, 3, requires_grad=True)
    for library, updates in zip(BOTH, (2, 1), strict=True):
        for use_reentrant in (False, True):
            model = network(library)
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
            assert model[1].num_batches_tracked == updates


def test_row_13_three_settings_for_three_behaviours():
    """They say: "two flags control three behaviours"."""
    x, found = torch.randn(64, 3) * 3 + 5, set()

    def behaviour(layer):
        y = layer(x)
        return y.mean().abs().item() < 1e-5, layer.num_batches_tracked.item() == 1

    for training in (True, False):
        for track in (True, False):
            stock = nn.BatchNorm1d(3).train(training)
            stock.track_running_stats = track
            found.add(behaviour(stock))
    assert found == {(True, True), (True, False), (False, False)}  # and not as the flags say
    for statistics in ("batch", "running"):
        for update in ("always", "never"):
            for training in (True, False):
                layer = bn.BatchNorm1d(3, statistics=statistics, update=update).train(training)
                layer.weight.requires_grad_(False)
                assert behaviour(layer) == (statistics == "batch", update == "always")
                assert layer(x).requires_grad  # by the bias


def test_row_14_momentum_and_eps_say_what_they_mean():
    """They say: "momentum and eps mean other things elsewhere"."""
    config = {"axis": -1, "momentum": 0.99, "epsilon": 1e-3}
    stock, copied = nn.BatchNorm1d(1), nn.BatchNorm1d(1, momentum=config["momentum"])
    batches = torch.randn(100, 32, 1) + torch.linspace(0, 1, 100)[:, None, None]
    weights = [torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1)]
    converted = from_keras(config, [weight.numpy() for weight in weights])
    for batch in batches:
        for layer in (stock, copied, converted.train()):
            layer(batch)
    last = batches[-1].mean()
    assert (copied.running_mean - last).abs() < 0.01  # it forgets all but the last batch
    assert converted.momentum == pytest.approx(0.01)
    assert converted.eps == 1e-3
    layer = bn.BatchNorm1d(1, half_life_batches=69)
    assert layer.momentum == pytest.approx(0.01, rel=0.01)
    assert converted.half_life_batches == pytest.approx(69, rel=0.01)


def test_row_15_ranks_have_the_statistics_of_all(monkeypatch):
    """They say: "ranks hold different statistics; the logged score is not the checkpoint's"."""
    models = [nn.BatchNorm1d(3, momentum=None) for _ in range(4)]
    x = torch.randn(4, 64, 3) + 3 * torch.arange(4)[:, None, None]  # a class on each
    for model, share in zip(models, x, strict=True):
        model(share)
    truth = x.reshape(-1, 3).var(0)
    averaged = torch.stack([m.running_var for m in models]).mean(0)  # what DDP users do
    assert (averaged < truth / 5).all()
    with pytest.raises(RuntimeError, match="on ranks 1, 2, 3 is not that of rank 0"):
        over_processes(monkeypatch, bn.assert_statistics_agree, models)
    report = over_processes(monkeypatch, bn.reduce_statistics, models)
    assert report.spread > 1
    torch.testing.assert_close(models[0].running_mean, x.reshape(-1, 3).mean(0))
    torch.testing.assert_close(models[0].running_var, truth, rtol=0.01, atol=0)


def test_row_16_what_is_exported_has_standard_nodes_and_computes_the_same():
    """They say: "export, compile, QAT traps"."""
    x = torch.randn(8, 3)

    def nodes(layer):
        graph = torch.export.export(layer.eval(), (x,)).graph
        return [node for node in graph.nodes if "batch_norm" in str(node.target)]

    for library in BOTH:  # in evaluation, but without running statistics
        found = nodes(library.BatchNorm1d(3, track_running_stats=False))
        assert [node.args[5] for node in found] == ([True] if library is nn else [])
    for layer in (bn.BatchNorm1d(3, eps=1e-3), bn.BatchRenorm(3, eps=1e-3, activation="relu")):
        (node,) = nodes(layer)
        assert (str(node.target), node.args[5], node.args[7]) == (
            "aten.batch_norm.default", False, 1e-3,
        )  # fmt: skip
    report = bn.check_parity(network(bn), x, ways=["exported", "onnx"])
    assert report.ok
    assert [way.nodes for way in report.ways] == [1, 1]


def test_row_17_statistics_stay_wide_in_half_models():
    """They say: "reduced precision outside autocast"."""
    for half in (torch.float16, torch.bfloat16):
        batches = (torch.randn(300, 64, 1) * 300 + 1000).to(half)
        stock, layer = (lib.BatchNorm1d(1, momentum=0.01).to(half) for lib in BOTH)
        for batch in batches:
            stock(batch)
            layer(batch)
        assert stock.running_var.dtype == half
        assert not stock.running_var.isfinite() or stock.running_mean < 950  # over, or stuck
        assert layer.running_var.dtype == torch.float32
        torch.testing.assert_close(layer.running_mean, torch.tensor([951.0]), rtol=0.02, atol=0)
        assert 80_000 < layer.running_var < 90_000
    double = torch.randn(4, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mixed dtype"):
        nn.BatchNorm1d(1)(double)
    assert bn.BatchNorm1d(1)(double).dtype == torch.float64


def test_row_18_federated_statistics_are_those_of_all_data():
    """They say: "federated averaging forgets the buffers"."""
    shares = (torch.randn(100, 3) + torch.arange(100)[:, None] / 20).split([10, 30, 60])
    clients = [network(nn) for _ in shares]
    for client, share in zip(clients, shares, strict=True):
        bn.calibrate(client, [share])
    server, whole = network(nn), network(nn)
    bn.calibrate(whole, [torch.cat(shares)])
    with torch.no_grad():  # as it is done: over parameters
        for p, *theirs in zip(*(m.parameters() for m in (server, *clients)), strict=True):
            p.copy_(sum(q * len(share) / 100 for q, share in zip(theirs, shares, strict=True)))
    assert server[1].num_batches_tracked == 0
    states = [client.state_dict() for client in clients]
    merged = bn.merge_statistics(zip(states, map(len, shares), strict=True))
    assert server.load_state_dict(merged, strict=False).unexpected_keys == []
    torch.testing.assert_close(server[1].running_mean, whole[1].running_mean)
    torch.testing.assert_close(server[1].running_var, whole[1].running_var)


def test_row_19_vmap_and_a_pure_function():
    """They say: "vmap and per-sample gradients reject BN"."""
    x, mean, var = torch.randn(5, 8, 3), torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor as input"):
        torch.vmap(lambda x: F.batch_norm(x, mean, var, training=True))(x)
    start = bn.State(mean, var, torch.tensor(0))
    y, state = torch.vmap(lambda x: bn.batch_norm(x, start, training=True))(x)
    assert state.running_mean.shape == (5, 3)
    for part, found, after in zip(x, y, state.running_var, strict=True):
        layer = nn.BatchNorm1d(3)
        torch.testing.assert_close(found, layer(part))
        torch.testing.assert_close(after, layer.running_var)
    assert mean.abs().max() == 0  # nothing was changed

    def loss(weight, example):
        return bn.batch_norm(example[None], start, weight=weight)[0].square().sum()

    weight = torch.ones(3)
    each = torch.vmap(torch.func.grad(loss), (None, 0))(weight, x[0])
    torch.testing.assert_close(each, 2 * x[0].square(), rtol=1e-4, atol=1e-5)


def test_row_21_no_layout_is_worse_than_another():
    """They say: "layout, device and size cliffs"."""
    x = torch.randn(64, 8, 32, 32) + 1e4
    double = x.double().transpose(0, 1).flatten(1)
    exact = (double - double.mean(1, keepdim=True)) / double.std(1, correction=0, keepdim=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        errors = [
            (library.BatchNorm2d(8)(x.contiguous(memory_format=memory_format))
             .transpose(0, 1).flatten(1) - exact).abs().max()
            for library in BOTH
        ]  # fmt: skip
        assert (errors[0] > 1) == (memory_format is torch.channels_last)  # of deviations
        assert errors[1] < 1e-4
    turned = torch.randn(16, 32, 8).transpose(1, 2)
    assert nn.BatchNorm1d(8)(turned).stride() != turned.stride()  # a copy, and another layout
    assert bn.BatchNorm1d(8)(turned).stride() == turned.stride()


def test_row_22_ghost_and_renorm_with_any_rest_and_rank():
    """They say: "ghost and renorm: scattered, slow, partial"."""
    x = torch.randn(9, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.cat([nn.BatchNorm1d(3)(part) for part in x.split(4)])  # how it is written by hand
    layer = bn.GhostBatchNorm(3, ghost_size=4)
    torch.testing.assert_close(layer(x)[4:], nn.BatchNorm1d(3)(x[4:]))  # the rest joins a group
    assert layer.num_batches_tracked == 1
    for shape in [(9, 3), (9, 3, 5), (9, 3, 5, 5), (9, 3, 2, 2, 2)]:
        for norm in (bn.GhostBatchNorm(3, ghost_size=4), bn.BatchRenorm(3)):
            assert norm(torch.randn(shape)).shape == shape
            assert norm.eval()(torch.randn(1, *shape[1:])).isfinite().all()
    renorm = bn.BatchRenorm(3, warmup_batches=0, r_batches=8, d_batches=8)
    for _ in range(4):
        renorm(x)
    resumed = bn.BatchRenorm(3, warmup_batches=0, r_batches=8, d_batches=8)
    resumed.load_state_dict(renorm.state_dict())
    assert resumed.limits() == renorm.limits() == (2, 2.5)


def test_row_23_each_distribution_has_its_own_statistics():
    """They say: "several distributions: GANs, AdvProp, domains"."""
    real, fake = torch.randn(64, 3), torch.randn(64, 3) + 10
    stock = nn.BatchNorm1d(3, momentum=0.5)
    for _ in range(10):
        stock(real)
        stock(fake)
    assert stock.eval()(real).mean() < -0.5  # measured against neither
    trained = bn.BatchNorm1d(3, momentum=0.5)
    for _ in range(10):
        trained(real)
    layer = bn.BankedBatchNorm.from_layer(trained, ("real", "fake"))
    torch.testing.assert_close(layer["fake"].state_dict(), trained.state_dict())
    for _ in range(20):
        layer(torch.cat([real, fake]), domain=torch.arange(128) // 64)
    for name, x in (("real", real), ("fake", fake)):
        with bn.domain(name):
            assert layer.eval()(x).mean().abs() < 1e-2


def test_row_25_cancellation_constant_channels_and_empty_batches():
    """They say: "cancellation, constant channels, empty batches"."""
    constant, images = torch.full((7, 1), 16777216.0) * 1.1, torch.randn(64, 8, 32, 32) + 1e4
    images = images.to(memory_format=torch.channels_last)
    for library in BOTH:
        ours = library is bn
        assert (library.BatchNorm1d(1)(constant).abs().max() == 0) == ours
        layer = library.BatchNorm1d(1)
        leaf = torch.empty(0, 1, requires_grad=True)
        layer(leaf).sum().backward()
        assert (layer.num_batches_tracked == 0) == ours
        assert layer.weight.grad == layer.bias.grad == 0
        assert layer.running_var == 1
        layer = library.BatchNorm2d(8, momentum=1.0)
        layer(images)
        variance = images.double().transpose(0, 1).flatten(1).var(1)
        assert torch.allclose(layer.running_var.double(), variance, rtol=1e-5) == ours
    layer(torch.full((2, 8, 4, 4), 1e-30))
    assert (layer.running_var >= 0).all()


def test_row_20_memory_is_reported_and_saved_without_an_extension():
    """They say: "memory; extensions that will not install"."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Mish()
    )
    example = (torch.randn(4, 3, 16, 16),)
    report = bn.memory_report(model, example)
    activated = 4 * 4 * 32 * 14 * 14  # bytes, which ReLU keeps, and the convolution after it
    assert report.layers["2"]["stock"] == activated
    saved = report.total["stock"] - report.total["save_memory"]
    assert saved == pytest.approx(activated, rel=0.01)
    with bn.backend("eager"):  # which is all there is where nothing was compiled
        fast = bn.accelerate(model, save_memory=True)
        torch.testing.assert_close(fast(*example), model(*example))


def test_row_08_folding_changes_nothing_and_misses_nothing():
    """They say: "folding changes the results, or misses patterns"."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.after = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.before, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.linear(self.before((y + self.after(y)).mean((2, 3))))

    model, x = Block(), torch.randn(4, 3, 8, 8)
    nn.init.ones_(model.after.bias)
    model(x)
    expected = model.eval()(x)
    by_order = copy.deepcopy(model)  # the convolution and what comes next among the modules
    by_order.conv = fuse_conv_bn_eval(by_order.conv, by_order.after)
    by_order.after = nn.Identity()
    assert (by_order(x) - expected).abs().max() > 0.1
    folded, report = bn.fold(model, x)
    torch.testing.assert_close(folded(x), expected)
    assert report.folded == {"before": ["linear"]}
    assert report.left == {"after": "add reads what it normalizes, too; add reads what it returns"}
    assert report.max_error < 1e-5


def test_row_01_evaluation_is_far_worse_than_training():
    """They say: "eval() is far worse than train()"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    centres = 3 * torch.randn(3, 8)

    def batches(count):
        labels = [torch.randint(3, (64,)) for _ in range(count)]
        return [(centres[y] + torch.randn(64, 8), y) for y in labels]

    for x, y in batches(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    data = batches(10)
    assert bn.check(model, data).ok
    model[1].reset_running_stats()  # as a checkpoint does that left the buffers out
    report = bn.check(model, data)
    assert not report.ok
    causes = {finding.code: finding for finding in report.findings}
    assert causes["eval_train_gap"].layer == "1"
    cause = causes["never_updated"]
    assert cause.layer == "1"
    exec(cause.fix, {"bn": bn, "model": model, "data": [x for x, _ in data]})
    assert bn.check(model, data).ok


def test_row_24_adaptation_at_test_time_is_watched_and_taken_back():
    """They say: "test-time adaptation is fragile"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(300, 8)
    bn.calibrate(model, [x])
    y = model(x).argmax(1)
    before = copy.deepcopy(model.state_dict())
    shifted = [(part + 2, labels) for part, labels in zip(x.split(100), y.split(100), strict=True)]
    report = bn.adapt(model, shifted, entropy_steps=300, learning_rate=3.0)
    assert report.sharpened.collapse is not None  # and so it was taken back
    assert report.gain.before < report.gain.after  # by the statistics alone
    report.undo()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
