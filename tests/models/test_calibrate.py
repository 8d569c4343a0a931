"""Calibration: exact moments of a data set, however it is split, and nothing else changed."""

import copy
import importlib

import pytest
import torch
from models.holding import attributes, buffers_of, layers_of
from support import Member, Together, assert_close
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn

SPLITS = [[2, 2, 4, 8, 16, 32, 64], [128], [1] * 128, [3, 125], [127, 1]]


def data(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype) * 3 + 5


def deep():
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), bn.BatchNorm1d(4),
        nn.Tanh(), bn.GhostBatchNorm(4, ghost_size=2), nn.Dropout(0.5), nn.Linear(4, 2),
    ).double()  # fmt: skip


def snapshot(model):
    """Return modes, settings and hooks of all modules, and the values of all buffers."""
    return attributes(model), buffers_of(model)


def assert_unchanged(model, before):
    held, buffers = snapshot(model)
    assert held == before[0]
    torch.testing.assert_close(buffers, before[1], rtol=0, atol=0, equal_nan=True)


def assert_moments(layer, x, kind="sum"):
    """Assert that the running statistics are the moments of all values."""
    x = x.double().transpose(0, 1).flatten(1)
    dtype = torch.promote_types(layer.running_mean.dtype, torch.float32)
    assert_close(layer.running_mean, x.mean(1), dtype, kind)
    assert_close(layer.running_var, x.var(1), dtype, kind)


@pytest.mark.parametrize("sizes", SPLITS, ids=lambda sizes: f"{len(sizes)} batches")
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        bn.BatchNorm1d(3, momentum=None),
        bn.GhostBatchNorm(3, ghost_size=4),
        bn.SyncBatchNorm(3),
        bn.BatchNorm1d(3, activation="relu", correction=1, on_small_batch="error"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_data_set_has_one_answer_however_it_is_split(layer, sizes):
    layer, x = copy.deepcopy(layer).double(), data(128, 3)
    report = bn.calibrate(layer, x.split(sizes))
    assert_moments(layer, x)
    assert layer.num_batches_tracked == report.batches == len(sizes)


def test_images_count_their_pixels():
    layer, x = nn.BatchNorm2d(3), data(20, 3, 4, 5, dtype=torch.float32)
    bn.calibrate(layer, x.split(7))
    assert_moments(layer, x)


@pytest.mark.parametrize("sizes", SPLITS, ids=lambda sizes: f"{len(sizes)} batches")
def test_in_sequence_a_deep_network_has_one_answer_too(sizes):
    model, x = deep(), data(128, 3)
    assert bn.calibrate(model, x.split(sizes), sequential=True).done == ["1", "4", "6"]
    z = x
    for module in model.eval():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert_moments(module, z)
        z = module(z)


def test_in_one_pass_each_layer_is_normalized_by_its_batch():
    model, x = deep(), data(128, 3)
    expected, inputs = copy.deepcopy(model), {}
    for at, layer in enumerate(layers_of(expected)):
        layer.register_forward_pre_hook(
            lambda _, x, at=at: inputs.setdefault(at, []).append(x[0].detach())
        )
    expected[7].eval()
    for part in x.split(16):
        expected(part)
    bn.calibrate(model, x.split(16))
    for at, layer in enumerate(layers_of(model)):
        assert_moments(layer, torch.cat(inputs[at]))


def test_data_sorted_by_class_where_torch_loses_what_lies_between_the_batches():
    classes = (torch.arange(10.0) - 4.5) * 1.077
    x = (classes[:, None] + 0.11 * torch.randn(10, 64)).reshape(-1, 1)
    torchs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(x.split(64), torchs)
    bn.calibrate(ours, x.split(64))
    assert x.var().item() == pytest.approx(9.58, abs=0.1)
    assert torchs.running_var.item() == pytest.approx(0.012, abs=0.003)
    assert_moments(ours, x)


def test_only_batch_norms_are_in_the_mode_of_the_batch():
    model, modes = deep().train(), []
    for at, module in enumerate(model):
        module.register_forward_hook(lambda m, x, y, at=at: modes.append((at, m.training, x[0], y)))
    assert not bn.calibrate(model, [data(8, 3)]).left
    assert len(modes) == len(model)
    assert not any(training for _, training, _, _ in modes)
    _, _, x, y = modes[7]
    assert torch.equal(x, y)  # dropout
    assert not any(y.requires_grad for *_, y in modes)
    _, _, _, z = modes[4]
    assert z.mean(0).abs().max() < 1e-12  # by the batch, and not by statistics of the start
    assert all(module.training for module in model.modules())


def test_layers_that_did_not_run_are_left_as_they_were():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3), bn.BatchNorm1d(3)
            self.none = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x):
            return self.none(self.a(x))

    model = Branches()
    model.b.running_mean.fill_(7)
    for sequential in (False, True):
        report = bn.calibrate(model, [data(8, 3).float()], sequential=sequential)
        assert report.done == ["a"]
        assert report.left == {"none": "it has no running statistics", "b": "it did not run"}
        assert model.b.running_mean.tolist() == [7, 7, 7]
        assert model.b.num_batches_tracked == 0


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_used_twice_has_the_statistics_of_both_uses(sequential):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x[:, 0]), self.norm(x[:, 1])

    model, x = Twice().double(), data(32, 2, 3)
    bn.calibrate(model, x.split(5), sequential=sequential)
    assert_moments(model.norm, x.reshape(-1, 3))
    assert model.norm.num_batches_tracked == 14


def test_the_schedule_of_renormalization_stays_where_it_was():
    layer = bn.BatchRenorm(3, warmup_batches=0, r_batches=4, d_batches=4)
    for _ in range(4):
        layer(data(8, 3).float())
    x = data(8, 3).float()
    bn.calibrate(layer, [x])
    assert_moments(layer, x)
    assert [limit.item() for limit in layer.limits()] == [3, 5]


class Failing:
    """Batches, of which one is an error, in the pass of that number."""

    def __init__(self, error, at_pass):
        self.error, self.left = error, at_pass

    def __iter__(self):
        yield data(8, 3)
        yield data(8, 3)
        self.left -= 1
        if self.left == 0:
            raise self.error
        yield data(8, 3)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize(("sequential", "at_pass"), [(False, 1), (True, 1), (True, 2), (True, 3)])
def test_an_error_half_way_leaves_every_bit(error, sequential, at_pass):
    model = deep().train()
    model[0].eval()
    model[4].eval()
    model[1].register_forward_pre_hook(lambda *_: None)
    bn.freeze(model, where="6", affine=False)
    model[6].running_var.fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(error):
        bn.calibrate(model, Failing(error, at_pass), sequential=sequential)
    assert_unchanged(model, before)


def test_an_error_of_the_model_does_so_too():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 3))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bn.calibrate(model, [torch.randn(8, 3)])
    assert_unchanged(model, before)


def test_success_changes_the_statistics_alone():
    model = deep().train()
    model[2].eval()
    before = snapshot(model)
    for sequential in (False, True):
        bn.calibrate(model, data(8, 3).split(4), sequential=sequential)
        assert snapshot(model)[0] == before[0]


X = torch.randn(12, 3)


@pytest.mark.parametrize(
    ("batches", "options"),
    [
        (X, {}),
        ([X], {}),
        ([(X, torch.zeros(12))], {}),
        ([[X]], {}),
        ([{"input": X}], {}),
        (X.split(5), {}),
        ((part for part in X.split(5)), {}),
        (DataLoader(TensorDataset(X, X), 5), {}),
        ([*X.split(6), torch.zeros(6, 3)], {"max_batches": 2}),
        ([("name", X)], {"call": lambda model, batch: model(batch[1])}),
        ([X.where(X < 1, torch.nan)] * 2 + [X], {}),
        (
            [(torch.cat([X, X + 9]), torch.arange(24) < 12)],
            {"call": lambda model, batch: model(batch[0], mask=batch[1])},
        ),
    ],
)
def test_data_are_any_batches_and_call_says_how(batches, options):
    layer = bn.BatchNorm1d(3)
    bn.calibrate(layer, batches, **options)
    assert_moments(layer, X)


def test_a_generator_gives_no_batch_more_than_asked_for():
    batches = iter(X.split(2))
    bn.calibrate(bn.BatchNorm1d(3), batches, max_batches=2)
    assert len(list(batches)) == 4


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "no batches to calibrate with"),
        ([X], {"max_batches": 0}, ValueError, "max_batches is 0: expected 1 or more"),
        (["text"], {}, TypeError, "a batch is a str: expected a tensor.*call=lambda"),
        ([()], {}, TypeError, "a batch is a tuple"),
        (iter([X]), {"sequential": True}, TypeError, "through only once, being a list_iterator"),
    ],
)
def test_what_cannot_be_is_an_error(batches, options, error, message):
    layer = nn.BatchNorm1d(3)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        bn.calibrate(layer, batches, **options)
    assert_unchanged(layer, before)


def test_one_value_has_no_variance():
    layer = bn.BatchNorm1d(3)
    report = bn.calibrate(layer, [X[:1]])
    assert report.left == {"": "it saw one value a channel, which has no variance"}
    assert layer.running_var.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_weights_get_statistics_of_their_own(kind):
    model = deep()
    options = {} if kind == "swa" else {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}
    average = AveragedModel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(data(16, 3)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    x = data(128, 3)
    assert bn.calibrate(average, x.split(16), sequential=True).done[0] == "module.1"
    assert_moments(average.module[1], average.module[0](x))
    assert average.n_averaged == 3
    assert layers_of(model)[0].num_batches_tracked == 3


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_models_get_statistics_of_float32(half):
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4)).to(half)
    x = X.to(half)
    bn.calibrate(model, x.split(5))
    assert model[1].running_var.dtype == torch.float32
    assert_moments(model[1], model[0](x))


def test_a_compiled_model_is_calibrated_as_it_was_written():
    torch._dynamo.reset()
    model = deep()
    expected, x = copy.deepcopy(model), data(32, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for sequential in (False, True, True):
        done = bn.calibrate(compiled, x.split(5), sequential=sequential).done
        assert done == ["_orig_mod.1", "_orig_mod.4", "_orig_mod.6"]
        bn.calibrate(expected, x.split(5), sequential=sequential)
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


class Process(Member):
    """A process among several, which are threads here."""

    def gather(self, row):
        return torch.stack(self.together.exchange(self.rank, row))


@pytest.mark.parametrize("sequential", [False, True])
def test_processes_merge_what_they_saw_and_one_may_have_seen_nothing(monkeypatch, sequential):
    module = importlib.import_module("batchnorm.models.calibrate")
    monkeypatch.setattr(module, "synchronized", lambda pool: pool)
    x, model = data(24, 3), deep()
    models = [copy.deepcopy(model) for _ in range(3)]
    shares = [[], x[:5].split(2), x[5:].split(19)]

    def work(rank, member):
        pool = Process(member.together, rank)
        return bn.calibrate(
            models[rank], shares[rank], process_group=pool, sequential=sequential, where=["4", "6"]
        )

    for report in Together(3).run(work):
        assert report.done == ["4", "6"]
    if sequential:
        bn.calibrate(model, x, sequential=True, where=["4", "6"])
    for found in models:
        torch.testing.assert_close(
            layers_of(found)[1].state_dict(), layers_of(models[0])[1].state_dict()
        )
        assert_moments(found[4], model[:4].eval()(x))
        assert found[4].num_batches_tracked == 4
        if sequential:
            assert_close(found[6].running_var, model[6].running_var, torch.float64, "sum")


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([X * torch.nan, X[:0]], "no batch was finite"),
        ([X[:0]] * 2, "no batch had values"),
        (
            [torch.full((4, 3), 1e20), torch.full((4, 3), -1e20)],
            "its variance does not fit float32",
        ),
    ],
)
def test_what_gives_no_statistics_is_left_with_the_reason(batches, reason, sequential):
    layer = bn.BatchNorm1d(3)
    before = snapshot(layer)
    report = bn.calibrate(layer, batches, sequential=sequential)
    assert (report.done, report.left) == ([], {"": reason})
    assert_unchanged(layer, before)


def test_a_half_layer_of_torch_gets_what_fits_half():
    layer, x = nn.BatchNorm1d(1).half(), torch.tensor([[3.0], [5]]).half()
    assert bn.calibrate(layer, [1000 * x]).left == {"": "its variance does not fit float16"}
    assert layer.running_var.item() == 1
    assert bn.calibrate(layer, [x]).done == [""]
    assert (layer.running_mean.item(), layer.running_var.item()) == (4, 2)
    assert layer.running_var.dtype == torch.float16


@pytest.mark.parametrize("sequential", [False, True])
def test_frozen_layers_stay_until_they_are_unfrozen(sequential):
    model, x = nn.Sequential(nn.BatchNorm1d(3), bn.FrozenBatchNorm(3)), data(16, 3).float()
    bn.freeze(model, where="0")
    before = snapshot(model)
    report = bn.calibrate(model, [x], sequential=sequential)
    assert (report.done, report.left) == ([], dict.fromkeys("01", "it is frozen"))
    assert_unchanged(model, before)
    bn.unfreeze(model, where="0")
    assert bn.calibrate(model, [x], sequential=sequential).done == ["0"]
    assert_moments(model[0], x)


def test_statistics_that_only_do_not_follow_are_calibrated():
    layer, x = bn.BatchNorm1d(3, update="never"), data(16, 3).float()
    bn.calibrate(layer, [x])
    assert_moments(layer, x)
