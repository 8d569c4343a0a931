"""The monitor: what it records is right, and the training it watches is as if it were not there."""

import copy
import io
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.diagnose.monitor import Monitor
from batchnorm.diagnose.monitor_measures import MEASURES, VALUES, distance, drawn, percentiles


def network():
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6),
        bn.BatchNorm1d(6, activation="relu"), nn.Linear(6, 1),
    )  # fmt: skip


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def train(model, optimizer, steps, accumulate=1, forward=None):
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            (forward or model)(torch.randn(16, 3)).square().mean().backward()
        optimizer.step()


def steps_of(monitor):
    return sorted({record.step for record in monitor.records})


def is_clean(model):
    """Return whether nothing is left of a monitor."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return not hooks and not optimizers._global_optimizer_post_hooks


def around(layer):
    return nn.Sequential(nn.Identity(), layer)


def record_of(layer, x, **keywords):
    """Return what is recorded of a layer that gets a batch."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, **keywords)

    with Monitor(Model()) as monitor:
        monitor._model(x)
    (record,) = monitor.records
    return record


def test_the_numbers_are_those_of_the_batch():
    layer = nn.BatchNorm1d(5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-2.0, 1, 0.001, 3, 1]))
        layer.bias.copy_(torch.tensor([1.0, 2, -3, 0.5, 0]))
        layer.running_mean.uniform_()
        layer.running_var.uniform_(1, 2)
    kept = copy.deepcopy(layer)
    x, y = torch.randn(2, 40, 5, dtype=torch.float64) * 3 + 1
    x[:, 4], y[:, 4] = 7, 7
    model = around(layer)
    with Monitor(model, every=1) as monitor:
        for batch in (x, y):
            model(batch)
            monitor.step()
    first, second = monitor.records
    assert (first.step, first.layer, second.step) == (0, "1", 1)
    assert first.mean == pytest.approx(x.mean().item())
    assert first.var == pytest.approx(x.var(0, correction=0).mean().item())
    expected = np.percentile(x[:, [0, 1, 3, 4]].numpy(), (15, 50, 85), axis=0).T
    np.testing.assert_allclose(first.percentiles, expected, rtol=1e-12)
    assert first.dead == pytest.approx(2 / 5)  # one has no weight, and one no variance
    assert first[-8:-2] == pytest.approx((0.6002, 0.001, 3, 0.1, 0, 3))
    running = kept.running_mean, kept.running_var + kept.eps
    assert first.from_running == pytest.approx(divergence(x, 1, kept.eps, *running))
    of_x = x.mean(0), x.var(0, correction=0) + kept.eps
    assert second.moved == pytest.approx(divergence(y, 0, kept.eps, *of_x))
    assert math.isnan(first.moved)
    assert math.isnan(first.since)
    assert second.since == 1
    assert math.isnan(first.weight_grad)  # nobody has called backward


def divergence(batch, correction, eps, mean, var):
    a = Normal(batch.mean(0), (batch.var(0, correction=correction) + eps).sqrt())
    b = Normal(mean, var.sqrt())
    return (kl_divergence(a, b) + kl_divergence(b, a)).mean().item()


@given(*[st.floats(-1e3, 1e3)] * 2, *[st.floats(0, 1e6)] * 2)
def test_the_distance_is_one(mean, mean_2, var, var_2):
    a, b = (
        [torch.tensor([v], dtype=torch.float64) for v in p] for p in ((mean, var), (mean_2, var_2))
    )
    there, back = distance(*a, *b, eps=1e-5), distance(*b, *a, eps=1e-5)
    assert there >= 0
    torch.testing.assert_close(there, back)
    assert distance(*a, *a, eps=1e-5) == 0


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_percentiles_are_those_of_numpy_without_what_is_nan(values):
    there = np.array([value for value in values if not math.isnan(value)])
    found = percentiles(np.array([values]))[0]
    if len(there) == 0:
        assert np.isnan(found).all()
    elif np.isfinite(there).all():
        np.testing.assert_allclose(found, np.percentile(there, (15, 50, 85)), rtol=1e-12)


def test_a_sample_of_large_images_is_bounded_and_has_no_period():
    assert len(drawn(10**7, "cpu")) == VALUES
    assert drawn(10**7, "cpu").unique().numel() == VALUES
    columns = torch.linspace(0, 100, 64).expand(32, 4, 64, 64)  # as a fixed stride would not see
    record = record_of(nn.BatchNorm2d(4), columns)
    np.testing.assert_allclose(record.percentiles, [[15, 50, 85]] * 4, atol=2)
    rows = record_of(nn.BatchNorm2d(4), columns.mT.contiguous())
    np.testing.assert_allclose(rows.percentiles, [[15, 50, 85]] * 4, atol=2)


def test_the_layout_is_of_no_account():
    x = torch.randn(16, 6, 12, 12)
    expected = record_of(nn.BatchNorm2d(6), x)
    last = record_of(nn.BatchNorm2d(6), x.contiguous(memory_format=torch.channels_last))
    moved = record_of(bn.BatchNorm(6, channel_dim=-1), x.movedim(1, -1))
    for other in (last, moved):
        assert other.percentiles == expected.percentiles
        np.testing.assert_allclose(other[3:], expected[3:], rtol=1e-5)


def test_what_is_masked_is_not_there():
    x, mask = torch.randn(20, 3, 7), torch.rand(20, 7) > 0.4
    x.movedim(1, 2)[~mask] = 1e9
    record = record_of(bn.BatchNorm1d(3), x, mask=mask)
    there = x.movedim(1, 2)[mask]
    expected = np.percentile(there.numpy(), (15, 50, 85), axis=0).T
    np.testing.assert_allclose(record.percentiles, expected, rtol=1e-5)
    assert record.mean == pytest.approx(there.mean().item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_wider_ones(dtype):
    x = (torch.randn(64, 3) + 100).to(dtype)
    record = record_of(bn.BatchNorm1d(3), x)
    assert record.mean == pytest.approx(x.double().mean().item(), rel=1e-6)


def test_a_layer_of_no_affine_part_and_no_statistics_has_none():
    record = record_of(
        nn.BatchNorm1d(3, affine=False, track_running_stats=False), torch.randn(8, 3)
    )
    there = {name for name in MEASURES if not math.isnan(getattr(record, name))}
    assert there == {"mean", "var", "dead"}


def test_an_empty_batch_and_a_diverged_one_end_nothing():
    model = network()
    with Monitor(model, every=1) as monitor:
        train(model, sgd(model), 2)
        model(torch.full((4, 3), math.inf)).sum().backward()
        monitor.step()
    assert math.isnan(monitor.records[-1].mean)
    json.dumps(monitor.to_dict(), allow_nan=False)
    monitor.plot().savefig(io.BytesIO())
    assert "moved most" in repr(monitor)
    model = around(bn.BatchNorm1d(3, on_small_batch="skip"))
    with Monitor(model) as monitor:
        model(torch.empty(0, 3))
    assert monitor.records == []


@pytest.mark.parametrize("every", [1, 2])
def test_training_is_the_same_to_the_bit(every):
    model = network()
    twins = [model, copy.deepcopy(model)]
    torch.manual_seed(1)
    train(twins[0], sgd(twins[0], momentum=0.9), 5)
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    keys = list(twins[1].state_dict())
    with Monitor(twins[1], every=every) as monitor:
        train(twins[1], sgd(twins[1], momentum=0.9), 5)
        assert list(twins[1].state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), expected)
    torch.testing.assert_close(twins[1].state_dict(), twins[0].state_dict(), rtol=0, atol=0)
    assert len(steps_of(monitor)) == math.ceil(5 / every)


def test_what_a_weight_is_computed_from_is_left_alone():
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return weight

    model = around(nn.BatchNorm1d(3))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Counted())
    Counted.calls = 0
    with Monitor(model) as monitor:
        model(torch.randn(8, 3))
    assert Counted.calls == 1
    assert math.isnan(monitor.records[0].weight_mean)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_one_of_the_optimizer(accumulate):
    model = network()
    with Monitor(model, every=2) as monitor:
        train(model, sgd(model), 5, accumulate)
    assert steps_of(monitor) == [0, 2, 4]
    assert [r.layer for r in monitor.records] == ["1", "5"] * 3
    assert monitor.to_dict()["steps"] == 5


def test_evaluation_and_other_optimizers_are_no_steps():
    model, other = network(), network()
    optimizer = sgd(model)
    with Monitor(model, every=1) as monitor:
        for _ in range(3):
            model.eval()
            model(torch.randn(4, 3)).sum().backward()
            model.train()
            with torch.no_grad():
                model(torch.randn(4, 3))
            train(other, sgd(other), 2)
            optimizer.step()
            assert steps_of(monitor) == []
        train(model, optimizer, 2)
    assert steps_of(monitor) == [0, 1]


def test_two_optimizers_and_their_gradients_are_of_one_step():
    model = network()
    halves = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:4], model[4:])]
    with Monitor(model, every=1) as monitor:
        for _ in range(2):
            model(torch.randn(16, 3)).square().mean().backward()
            for optimizer in halves:
                optimizer.step()
                optimizer.zero_grad()
    assert steps_of(monitor) == [0, 1]
    assert all(record.weight_grad > 0 for record in monitor.records)


def test_the_gradients_are_those_that_the_optimizer_used():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for options in ({}, {"fused": True}):
        optimizer = sgd(model, **options)
        with Monitor(model, every=1) as monitor:
            x = torch.randn(16, 3)
            torch.manual_seed(3)
            twin = copy.deepcopy(model)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin(x).square().mean()
        loss.backward()
        for record in monitor.records:
            layer = twin.get_submodule(record.layer)
            grads = layer.weight.grad.norm().item(), layer.bias.grad.norm().item()
            assert record[-2:] == pytest.approx(grads, rel=0.1)


def test_a_step_that_a_scaler_skips_is_none():
    model = network()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    with Monitor(model, every=1) as monitor:
        for factor in (1, math.inf, 1):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(16, 3)).mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert steps_of(monitor) == [0, 1]
    assert monitor.to_dict()["steps"] == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_not_recorded(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model = Checkpointed()
    with Monitor(model, every=1) as monitor:
        optimizer = sgd(model)
        for _ in range(3):
            model(torch.randn(16, 3).requires_grad_()).square().mean().backward()
            optimizer.step()
    assert steps_of(monitor) == [0, 1, 2]
    model = network()
    with Monitor(model, every=1) as monitor:  # the model itself is recomputed
        optimizer = sgd(model)
        for _ in range(3):
            x = torch.randn(16, 3).requires_grad_()
            checkpoint(model, x, use_reentrant=False).square().mean().backward()
            optimizer.step()
    assert steps_of(monitor) == [0, 1, 2]


def test_a_layer_used_twice_is_recorded_at_its_first_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.norm(x) + 100)

    model = Twice()
    with Monitor(model) as monitor:
        model(torch.randn(8, 3) + 5)
    (record,) = monitor.records
    assert record.mean == pytest.approx(5, abs=1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind_by_an_error(error):
    class Failing(nn.Module):
        def forward(self, x):
            raise error

    model = network().append(Failing())
    with pytest.raises(error), Monitor(model, every=1) as monitor:
        model(torch.randn(8, 3))
    assert is_clean(model)
    assert monitor.records == []
    with Monitor(model, every=1) as monitor:  # and the loop may go on
        with pytest.raises(error):
            model(torch.randn(8, 3))
        model.pop(-1)
        train(model, sgd(model), 2)
    assert is_clean(model)
    assert steps_of(monitor) == [0, 1]


def test_it_can_be_stopped_and_started_again():
    model = network()
    monitor, optimizer = Monitor(model, every=1), sgd(model)
    for _ in range(2):
        monitor.start()
        with pytest.raises(RuntimeError, match="has started: stop it first"):
            monitor.start()
        train(model, optimizer, 2)
        monitor.stop()
        assert is_clean(model)
        train(model, optimizer, 2)
    assert steps_of(monitor) == [0, 1, 2, 3]
    with monitor:
        model(torch.randn(8, 3))
    train(model, optimizer, 1)
    with monitor:  # and never heard of that
        train(model, optimizer, 1)
    assert steps_of(monitor) == [0, 1, 2, 3, 4, 5]


def test_layers_may_be_frozen_and_in_transactions():
    model = network()
    optimizer = sgd(model)
    with Monitor(model, every=1) as monitor:
        bn.freeze(model)
        train(model, optimizer, 1)
        bn.unfreeze(model)
        with bn.transaction(model):
            train(model, optimizer, 1, accumulate=2)
    frozen, thawed = monitor.records[:2], monitor.records[2:]
    assert all(math.isnan(record.weight_grad) for record in frozen)
    assert all(record.weight_grad > 0 for record in thawed)
    assert is_clean(model)


def test_copies_of_a_model_have_no_monitor():
    model = network()
    with Monitor(model, every=1, writer=Writer()) as monitor:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            train(other, sgd(other), 1)
        assert monitor.records == []
        train(model, sgd(model), 1)
    assert steps_of(monitor) == [0]


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 60))
def test_memory_is_bounded(most, every, steps):
    model = around(nn.BatchNorm1d(2, affine=False))
    with Monitor(model, every=every, max_records=most) as monitor:
        x = torch.randn(2, 2).requires_grad_()
        for _ in range(steps):
            model(x)
            monitor.step()
    found = steps_of(monitor)
    assert len(found) <= most
    assert found == list(range(0, steps, monitor.every))
    assert monitor.every == every or len(found) >= most / 2
    sinces = [record.since for record in monitor.records[1:]]
    assert all(monitor.every % since == 0 for since in sinces)


@pytest.mark.parametrize("first", ["compile", "monitor"])
def test_a_compiled_model_is_recorded_as_it_was_written(first):
    torch._dynamo.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    model = network()
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = sgd(model)
    if first == "compile":
        train(model, optimizer, 1, forward=compiled)
    else:
        torch.manual_seed(7)
        with Monitor(compiled, every=2) as monitor:
            train(model, optimizer, 5, forward=compiled)
            compiled(torch.randn(16, 3))
    if first == "compile":
        with Monitor(compiled, every=2) as monitor:
            train(model, optimizer, 5, forward=compiled)
    else:
        torch.manual_seed(7)
        train(expected, sgd(expected), 5)
        expected(torch.randn(16, 3))
        torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert steps_of(monitor) == [0, 2, 4]
    assert monitor.records[0].layer == "_orig_mod.1"
    assert len(graphs) == 1
    model.eval()  # of which what is compiled does not hear
    with Monitor(compiled) as monitor:
        compiled(torch.randn(16, 3))
    assert monitor.records == []


def test_a_model_that_runs_compiled_behind_its_back_trains_on_and_it_is_said():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with Monitor(model, every=1) as monitor:
        train(model, sgd(model), 2, forward=compiled)
    assert "no training forward pass was seen" in repr(monitor)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled in place.*give the monitor torch.compile"):
        monitor.start()


def test_an_accelerated_model_is_recorded():
    torch._dynamo.reset()
    model = network()
    accelerated = bn.accelerate(model)
    with Monitor(accelerated, every=2) as monitor:
        train(model, sgd(model), 3, forward=accelerated)
    assert steps_of(monitor) == [0, 2]


def test_ddp_is_recorded_from_outside_and_inside():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        for watched, name in ((wrapped, "module.1"), (model, "1")):
            with Monitor(watched, every=1) as monitor:
                train(model, sgd(model), 2, forward=wrapped)
            assert steps_of(monitor) == [0, 1]
            assert monitor.records[0].layer == name
            assert monitor.records[-1].weight_grad > 0
    finally:
        torch.distributed.destroy_process_group()


def test_transforms_and_traces_are_not_recorded():
    model = around(nn.BatchNorm1d(3, track_running_stats=False))
    with Monitor(model) as monitor:
        parameters = dict(model.named_parameters())
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, x).square().sum())(
            parameters, torch.randn(8, 3)
        )
    assert monitor.records == []


class Writer:
    """Keeps what it is given, as TensorBoard's writer does."""

    def __init__(self):
        self.written = []

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))


def test_a_writer_gets_each_record_once_and_whole():
    model, writer = network(), Writer()
    with Monitor(model, every=2, writer=writer, where="1") as monitor:
        train(model, sgd(model), 3)
        assert {step for *_, step in writer.written} == {0}
    assert {step for *_, step in writer.written} == {0, 2}
    values = {name: value for name, value, step in writer.written if step == 2}
    record = monitor.records[-1]
    assert values["batchnorm_moved/1"] == record.moved
    assert values["batchnorm_p50/1"] == record.percentiles[0][1]
    assert values["batchnorm_weight_grad/1"] == record.weight_grad > 0
    assert len(values) == len(writer.written) - len(values) + 1 == len(MEASURES) - 1 + 3
    monitor.stop()
    assert {step for *_, step in writer.written} == {0, 2}


def test_plain_data_are_by_layer_and_fit_json():
    model = network()
    with Monitor(model, every=1) as monitor:
        train(model, sgd(model), 3)
    data = json.loads(json.dumps(monitor.to_dict(), allow_nan=False))
    assert (data["steps"], data["every"], data["levels"]) == (3, 1, [15, 50, 85])
    own = data["layers"]["5"]
    assert own["channels"] == [0, 2, 3, 5]
    assert own["step"] == [0, 1, 2]
    assert own["moved"][0] is None
    assert np.shape(own["percentiles"]) == (3, 4, 3)
    assert own["mean"] == [r.mean for r in monitor.records if r.layer == "5"]


def test_a_frame_has_a_row_for_each_record():
    pytest.importorskip("pandas")
    model = network()
    with Monitor(model, every=1) as monitor:
        train(model, sgd(model), 3)
    frame = monitor.to_frame()
    assert len(frame) == 6
    assert frame.p50_0[0] == monitor.records[0].percentiles[0][1]
    assert list(frame.layer) == ["1", "5"] * 3


def test_a_frame_without_pandas_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas; to_dict gives the same"):
        Monitor(network()).to_frame()


def test_a_frame_is_made_of_columns(monkeypatch):
    class Frames:
        DataFrame = dict

    monkeypatch.setitem(sys.modules, "pandas", Frames)
    model = around(nn.BatchNorm1d(2))
    with Monitor(model, every=1) as monitor:
        train(nn.Sequential(nn.Linear(3, 2), model), sgd(model), 2)
    frame = monitor.to_frame()
    assert {len(column) for column in frame.values()} == {2}
    assert frame["p15_1"][0] == monitor.records[0].percentiles[1][0]
    assert math.isnan(frame["p15_3"][0])  # there is no such channel


def test_a_plot_has_six_layers_over_the_depth_at_most():
    model = nn.Sequential(*[bn.BatchNorm1d(3) for _ in range(20)])
    with Monitor(model, every=1) as monitor:
        train(model, sgd(model), 3)
    figure = monitor.plot()
    titles = [axes.get_title(loc="left") for axes in figure.axes[::2]]
    assert titles == ["0", "4", "8", "11", "15", "19"]
    figure.savefig(io.BytesIO())
    assert len(monitor.plot("1?").axes) == 2 * 6
    assert len(monitor.plot(["3"]).axes) == 2
    with pytest.raises(ValueError, match="where has 'x'"):
        monitor.plot("x")


def test_what_moved_most_is_said():
    model = network()
    with Monitor(model, every=1) as monitor:
        for at in range(3):
            model(torch.randn(64, 3) * 10**at)
            monitor.step()
    first, second = repr(monitor).splitlines()
    assert first == "Monitor: 3 records of 2 layers in 3 steps, every=1"
    assert second.startswith("  moved most: 1 ")


def test_a_repr_fits_a_terminal():
    model = nn.Sequential()
    block = model
    for _ in range(40):
        block.add_module("blocks", nn.Sequential())
        block = block.blocks
    block.add_module("norm", nn.BatchNorm1d(3))
    with Monitor(model, every=1) as monitor:
        train(model, sgd(model), 2)
    assert all(len(line) <= 80 for line in repr(monitor).splitlines())


def test_a_loop_that_it_does_not_understand_is_told():
    model = network()
    with Monitor(model, every=1) as monitor:
        assert "no training forward pass was seen" in repr(monitor)
        with pytest.raises(RuntimeError, match="nothing to plot: Monitor: no records"):
            monitor.plot()
        for _ in range(3):
            model(torch.randn(8, 3))
    assert "no optimizer has stepped after 3 forward passes: call monitor.step()" in repr(monitor)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(3, 3), {}, ValueError, "this Linear has no batch norm"),
        (nn.BatchNorm1d(3), {}, ValueError, "is a batch norm itself: expected a network"),
        (network(), {"every": 0}, ValueError, "every is 0: expected 1 or more"),
        (network(), {"max_records": 1}, ValueError, "max_records is 1: expected 2 or more"),
        (network(), {"where": "x"}, ValueError, "where has 'x'"),
        (network(), {"writer": "runs"}, TypeError, "a str, which has no add_scalar"),
    ],
)
def test_what_cannot_be_is_an_error(model, options, error, message):
    with pytest.raises(error, match=message):
        Monitor(model, **options)


def test_the_script_times_a_step_with_and_without(capsys):
    from benchmarks.models.networks import NETWORKS
    from benchmarks.monitor import main

    found = main(NETWORKS["resnet50"].quick(), seconds=0)
    assert list(found) == ["without", "recorded", "not recorded", "one in 20 recorded"]
    assert found["without"] == (1, 1, 1)
    assert all(0 < low <= middle <= high for low, middle, high in found.values())
    assert "time of a step" in capsys.readouterr().out
