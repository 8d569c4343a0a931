"""The doctor: what it says of healthy models, of gaps, neighbours, padding and copies."""

import copy
import importlib

import pytest
import torch
from diagnose.planted import BOTH, FEATURES, dense, examples, found, healthy, loader, setting
from models.holding import attributes, buffers_of
from support import Member, Together
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm as bn
from batchnorm.diagnose.check import check


def test_a_healthy_network_is_healthy_in_both_modes_with_data_and_without():
    for model in (healthy(), healthy().train()):
        for data in (None, loader(), loader(64, seed=2)):
            report = check(model, data)
            assert report.findings == []
            assert report.ok


@pytest.mark.parametrize("shape", [(), (6,), (6, 6), (4, 4, 4)], ids=len)
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_layers_of_any_rank_are_healthy_after_calibration(shape, ours):
    kinds = {0: "1d", 1: "1d", 2: "2d", 3: "3d"}
    layer = getattr(bn if ours else nn, f"BatchNorm{kinds[len(shape)]}")(5)
    x = 3 * torch.randn(256, 5, *shape) + 7
    bn.calibrate(layer, x.split(32))
    assert check(layer, x.split(32)).findings == []
    assert [f.code for f in check(layer, (x + 9).split(32)).findings] == ["eval_train_gap"]


def test_averaging_over_all_batches_is_no_fault():
    model = healthy()
    setting(BOTH, momentum=None)(model)
    assert check(model).findings == []


def test_a_new_model_has_no_fault_until_data_show_that_it_does_not_fit():
    model = dense()
    assert check(model).findings == []
    moved = [(x + 3, y) for x, y in loader()]
    assert found(check(model, moved))[0] == ("never_updated", "1")


def test_a_gap_names_the_first_layer_and_the_finding_that_explains_it():
    model, moved = healthy(), [(x + 3, y) for x, y in loader()]
    bn.calibrate(model, moved, sequential=True)
    model[1].reset_running_stats()
    report = check(model, moved)
    first = report.findings[0]
    assert (first.code, first.layer, first.severity) == ("eval_train_gap", "1", "error")
    assert first.cause == "never_updated of '1', see there"
    assert "accuracy is" in first.evidence
    assert list(report.gaps) == ["1", "4"]
    assert report.gaps["1"] > 0.5
    assert report.outputs > 0
    assert report.accuracy["batch"] > report.accuracy["evaluation"]


def test_the_gap_of_a_layer_is_a_distance_in_standard_deviations():
    layer, x = nn.BatchNorm1d(2), torch.randn(4096, 2)
    bn.calibrate(layer, x)
    assert check(layer, [x + 2 * x.std(0)]).gaps[""] == pytest.approx(2, rel=1e-3)
    assert check(layer, [(x - x.mean(0)) * 3 + x.mean(0)]).gaps[""] == pytest.approx(2, rel=1e-3)


def test_a_gap_after_dropout_and_a_bias_that_is_read_elsewhere():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.norm = nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES)

        def forward(self, x):
            z = self.map(x)
            return self.norm(z) + z

    model, data = Twice(), loader()
    bn.calibrate(model, data)
    assert found(check(model, data)) == []


def test_a_bias_before_two_batch_norms_is_taken_out_of_both():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(FEATURES, 8)
            self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])

        def forward(self, x):
            return [norm(self.map(part)) for norm, part in zip(self.norms, (x, -x), strict=True)]

    model, data = Heads(), loader()
    bn.calibrate(model, data)
    [finding] = check(model, data).findings
    assert (finding.code, finding.layer) == ("bias_before_norm", "norms.0")
    x = torch.randn(8, FEATURES)
    expected = model.eval()(x)
    exec(finding.fix, {"model": model})
    assert model.map.bias is None
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_make_no_channel_constant(dtype):
    layer = bn.BatchNorm1d(4)
    data = [(torch.randn(64, 4) / 2 + 10).to(dtype) for _ in range(8)]
    bn.calibrate(layer, data)
    assert check(layer, data).findings == []


def test_dropout_behind_an_activation_is_none_of_its_business():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, 8), nn.ReLU(), nn.BatchNorm1d(8))
    bn.calibrate(model, loader())
    assert found(check(model, loader())) == []


def test_dropout_right_before_says_how_much_variance_it_adds():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(FEATURES))
    data = [torch.randn(64, FEATURES) for _ in range(8)]
    bn.calibrate(model, data)
    [finding] = check(model, data).findings
    assert (finding.code, finding.layer) == ("dropout_before_norm", "1")
    assert "times as large" in finding.evidence


class TestPadding:
    """Sequences of unequal lengths, filled up with zeros."""

    def network(self, norm):
        return nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), norm)

    def batches(self, padded=True):
        lengths = torch.randint(5, 20, (8, 32))
        there = (torch.arange(20) < lengths[:, :, None]) | (not padded)
        return list(torch.randn(8, 32, 6, 20) * there[:, :, None]), lengths

    def test_is_found_where_the_layer_has_no_mask(self):
        model, (data, _) = self.network(nn.BatchNorm1d(8)), self.batches()
        bn.calibrate(model, data)
        [finding] = check(model, data).findings
        assert (finding.code, finding.layer) == ("padding_in_statistics", "2")

    def test_is_found_where_channels_are_last(self):
        layer, (data, _) = bn.BatchNorm(6, channel_dim=-1), self.batches()
        data = [x.transpose(1, 2) for x in data]
        bn.calibrate(layer, data)
        assert found(check(layer, data)) == [("padding_in_statistics", "")]

    def test_is_found_at_the_beginning_too(self):
        layer, (data, _) = nn.BatchNorm1d(6), self.batches()
        data = [x.flip(2) for x in data]
        bn.calibrate(layer, data)
        assert found(check(layer, data)) == [("padding_in_statistics", "")]

    def test_is_no_fault_with_a_mask(self):
        layer, (data, lengths) = bn.BatchNorm1d(6), self.batches()
        batches = [(x, torch.arange(20) < n[:, None]) for x, n in zip(data, lengths, strict=True)]

        def call(model, batch):
            return model(batch[0], mask=batch[1])

        bn.calibrate(layer, batches, call=call)
        assert check(layer, batches, call=call).findings == []

    def test_is_not_seen_where_there_is_none(self):
        model, (data, _) = self.network(nn.BatchNorm1d(8)), self.batches(padded=False)
        bn.calibrate(model, data)
        assert check(model, data).findings == []


def test_processes_that_do_not_agree_are_named(monkeypatch):
    module = importlib.import_module("batchnorm.models.statistics")
    monkeypatch.setattr(module, "synchronized", lambda pool: pool)
    models = [healthy() for _ in range(3)]

    def work(rank, member):
        return check(models[rank], process_group=Process(member.together, rank))

    assert [report.findings for report in Together(3).run(work)] == [[], [], []]
    models[2][4].running_mean[1] += 1
    for report in Together(3).run(work):
        [finding] = report.findings
        assert (finding.code, finding.layer) == ("ranks_disagree", "4")
        assert "on rank 2" in finding.evidence


class Process(Member):
    """A process among several, which are threads here."""

    def gather(self, row):
        return torch.stack(self.together.exchange(self.rank, row))


class TestCopies:
    """Averaged weights, with statistics of their own or without."""

    def averaged(self, **options):
        model = dense()
        data = loader()
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for x, y in data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                ema.update_parameters(model)
        return model.eval(), ema, data

    @pytest.mark.parametrize("with_data", [False, True])
    def test_statistics_of_the_model_are_not_those_of_averaged_weights(self, with_data):
        model, ema, data = self.averaged()
        with torch.no_grad():
            for parameter in ema.module[0].parameters():
                parameter.mul_(2)
        data = data if with_data else None
        [finding] = check(model, data, copies={"ema": ema}).findings
        assert (finding.code, finding.layer) == ("copy_statistics", "ema.module.1")
        exec(finding.fix, {"bn": bn, "ema": ema, "data": loader()})
        assert check(model, data, copies={"ema": ema}).findings == []

    def test_statistics_of_the_start_are_found_too(self):
        model, ema, _ = self.averaged()
        for layer in (ema.module[1], ema.module[4]):
            layer.reset_running_stats()
        assert found(check(model, copies={"ema": ema})) == [("copy_statistics", "ema.module.1")]

    def test_a_copy_with_the_same_weights_may_have_the_same_statistics(self):
        model = healthy()
        assert check(model, copies={"copy": copy.deepcopy(model)}).findings == []


def test_a_model_without_batch_norm_gets_a_note():
    report = check(nn.Linear(3, 3), torch.randn(4, 3))
    assert [(f.code, f.severity) for f in report.findings] == [("no_batch_norm", "note")]
    assert report.ok


class Failing:
    """Batches, of which the third is an error."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield from [examples(32)] * 2
        raise self.error


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_as_it_was(error):
    model = dense(bn.BatchNorm1d).train()
    model[4].eval()
    model[4] = bn.SyncBatchNorm(24, update="always")
    model.append(nn.Dropout())
    model[1].register_forward_pre_hook(lambda *_: None)
    model(torch.randn(8, FEATURES)).sum().backward()
    ema = copy.deepcopy(model)
    held = attributes(model), attributes(ema)
    buffers, gradients = buffers_of(model), [p.grad.clone() for p in model.parameters()]
    data, random = list(loader()), torch.get_rng_state()
    if error is None:
        check(model, data, copies={"ema": ema})
    else:
        with pytest.raises(error):
            check(model, Failing(error), copies={"ema": ema})
    assert (attributes(model), attributes(ema)) == held
    torch.testing.assert_close(buffers_of(model), buffers, rtol=0, atol=0)
    assert all(map(torch.equal, [p.grad for p in model.parameters()], gradients))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("at_call", range(1, 8))
def test_ctrl_c_in_any_forward_pass_leaves_everything_as_it_was(at_call):
    model, calls = dense(bn.BatchNorm1d).train(), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == at_call:
            raise KeyboardInterrupt

    model[4].register_forward_hook(interrupt)
    held, buffers = attributes(model), buffers_of(model)
    with pytest.raises(KeyboardInterrupt):
        check(model, [examples(32)] * 3)
    assert attributes(model) == held
    torch.testing.assert_close(buffers_of(model), buffers, rtol=0, atol=0)
    assert len(torch.overrides._get_current_function_mode_stack()) == 0


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "no batches to check with"),
        (torch.randn(8, FEATURES), {"max_batches": 0}, ValueError, "max_batches is 0"),
        (["text"], {}, TypeError, "a batch is a str"),
        (None, {"where": "7"}, ValueError, "the name of no batch norm"),
    ],
)
def test_what_cannot_be_is_an_error(data, options, error, message):
    with pytest.raises(error, match=message):
        check(healthy(), data, **options)


def test_data_may_be_gone_through_only_once_and_no_further_than_asked():
    batches = iter(list(loader()))
    assert check(healthy(), batches, max_batches=8).batches == 8
    assert len(list(batches)) == 24


def test_lazy_layers_are_to_be_called_first():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'1\.weight' has no size yet.*call the model"):
        check(model)
    model(torch.randn(8, 3))
    assert check(model).layers == 1


def test_where_chooses_layers():
    model = healthy()
    setting(BOTH, momentum=0.99)(model)
    assert found(check(model, where="4")) == [("momentum_convention", "4")]


def test_one_example_a_batch_is_looked_at_without_running_by_the_batch():
    report = check(healthy(), [(x, y) for x, y in loader(1, count=64)])
    assert {code for code, _ in found(report)} == {"small_batch"}
    assert report.outputs is None


def test_labels_show_what_the_moments_do_not():
    layer = nn.Sequential(nn.BatchNorm1d(3))
    x, y = torch.randn(256, 3), torch.arange(256) // 32
    bn.calibrate(layer, x.split(32))
    data = list(zip(x.split(32), y.split(32), strict=True))
    [finding] = check(layer, data).findings
    assert (finding.code, finding.layer) == ("unshuffled_batches", "0")
    assert "the labels" in finding.evidence


def test_the_report_can_be_read_stored_and_drawn():
    pytest.importorskip("matplotlib")
    model = healthy()
    setting(BOTH, momentum=0.99)(model)
    report = check(model, loader())
    assert repr(report).startswith(
        "0 errors, 2 warnings, 0 notes in 2 batch norms, over 32 batches"
    )
    assert "momentum_convention at 1, 4" in repr(report)
    assert report.to_dict()["findings"][0]["fix"] == "model[1].momentum = 0.01"
    figure = report.plot()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["1", "4"]
    with pytest.raises(ValueError, match="give data"):
        check(model).plot()


def test_names_are_written_as_python_has_them():
    model = nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm1d(2, momentum=0.99))})
    model.add_module("7", nn.BatchNorm1d(2, momentum=0.99))
    fixes = [finding.fix for finding in check(model).findings]
    assert fixes[0] == "model.a[0].momentum = 0.01"
    for fix in fixes:
        exec(fix, {"model": model})
    assert check(model).ok


def test_weights_drawn_at_random_are_no_error():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    nn.init.normal_(model[1].weight, 1, 0.02)  # as some begin
    assert [(f.code, f.severity) for f in bn.check(model).findings] == [
        ("never_updated", "warning")
    ]


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}])
def test_the_line_for_constant_channels_can_be_run(settings):
    model = nn.Sequential(nn.BatchNorm1d(60, **settings))
    x = torch.randn(64, 60)
    x[:, :50] = 0
    found = [f for f in bn.check(model, x.split(32)).findings if f.code == "constant_channels"]
    assert len(found) == 1
    exec(found[0].fix, {"model": model})


def test_some_channels_below_eps_are_noted():
    model = nn.Sequential(nn.BatchNorm1d(16))
    scale = torch.ones(16)
    scale[:6] = 5e-4
    data = (torch.randn(640, 16) * scale).split(64)
    bn.calibrate(model, data)
    (found,) = bn.check(model, data).findings
    assert (found.code, found.severity) == ("eps_over_variance", "note")
    assert "6 of 16 channels" in found.evidence
