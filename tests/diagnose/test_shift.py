"""How far data are from what running statistics remember: the score, its noise, its test."""

import json
import math

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make_architecture
from diagnose.drawn import draw, same, state_of, trained
from torch import nn

import batchnorm as bn
from batchnorm.diagnose.evidence import (
    REPLICATES,
    Evidence,
    corrected,
    discovered,
    excess,
    p_value,
)


def divergence(mean, var, kept_mean, kept_var, eps):
    """The symmetric Kullback-Leibler divergence of normal distributions, by their definition."""
    p, q = (
        torch.distributions.Normal(m.double(), (v.double() + eps).sqrt())
        for m, v in ((mean, var), (kept_mean, kept_var))
    )
    kl = torch.distributions.kl_divergence
    return (kl(p, q) + kl(q, p)).mean()


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_the_score_of_many_examples_is_the_divergence(layer):
    torch.manual_seed(0)
    model = layer(5, momentum=None)
    model.running_mean.normal_()
    model.running_var.uniform_(0.5, 2)
    x = torch.randn(20_000, 5) * torch.tensor([1.0, 2, 3, 0.5, 1]) + 1
    report = bn.measure_shift(model.eval(), x.split(1000))
    expected = divergence(
        x.mean(0), x.var(0), model.running_mean, model.running_var, model.eps
    )  # fmt: skip
    assert report.score == pytest.approx(float(expected), rel=1e-3)
    assert report.shifted
    assert report.p_value < 1e-6
    assert report.examples == 20_000
    channel = max(report.channels, key=lambda c: c.channel)
    assert channel.channel == 4
    unit = (model.running_var[4] + model.eps).sqrt()
    assert channel.mean == pytest.approx(float((x[:, 4].mean() - model.running_mean[4]) / unit))


def relu_first():
    """Channels that are seldom active, and then strongly."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(108, 64), nn.ReLU(), nn.BatchNorm1d(64),
        nn.Linear(64, 64), nn.ReLU(), nn.BatchNorm1d(64),
    )  # fmt: skip


def skewed(kind):
    """Features by themselves, far from normal."""
    return nn.Sequential(nn.Flatten(), Features(kind), nn.BatchNorm1d(32))


class Features(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        x = x[:, :32]
        chance = (x / 2).sigmoid()
        return {
            "rare": (chance > 0.75).float(),
            "exponential": -chance.log(),
            "log-normal": (0.7 * x).exp(),
        }[self.kind]


@pytest.mark.parametrize("count", [16, 32, 128, 512])
@pytest.mark.parametrize("network", ["conv", "relu first", "rare", "exponential"])
def test_at_most_one_clean_sample_in_twenty_is_a_false_alarm(network, count):
    if network == "conv":
        model = trained()
    else:
        model = relu_first() if network == "relu first" else skewed(network)
        with torch.no_grad():
            for batch in range(100):
                model(draw(32, seed=1000 + batch))
    model.eval()
    found = [bn.measure_shift(model, [draw(count, seed=seed)]) for seed in range(100)]
    assert np.mean([report.shifted for report in found]) <= 0.1  # 98% of such hundreds have no more
    layers = [any(layer.shifted for layer in report.layers.values()) for report in found]
    assert np.mean(layers) <= 0.1
    if count >= 32 and network == "conv":
        assert np.mean([any(c.shifted for c in r.channels) for r in found]) <= 0.15


@pytest.mark.parametrize("count", [32, 128])
def test_what_few_examples_cannot_know_costs_false_alarms_in_a_third_at_most(count):
    model = skewed("log-normal")
    with torch.no_grad():
        for batch in range(100):
            model(draw(32, seed=1000 + batch))
    found = [bn.measure_shift(model.eval(), [draw(count, seed=seed)]) for seed in range(100)]
    assert np.mean([report.shifted for report in found]) <= 1 / 3


@pytest.mark.parametrize("seed", range(20))
def test_there_is_always_a_probability(seed):
    """Whatever is constant, all but constant, rare, huge or tiny beside other channels."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.rand(shape, generator=generator)

    layer = nn.BatchNorm1d(40).eval()
    layer.running_mean.copy_(10 ** (12 * drawn(40) - 6))
    layer.running_var.copy_(10 ** (24 * drawn(40) - 12) * (drawn(40) > 0.2))
    x = (
        torch.randn(33, 40, generator=generator)
        * layer.running_var.sqrt()
        * 10 ** (4 * drawn(40) - 2)
    )
    x = (x + layer.running_mean) * (drawn(33, 40) < drawn(40) * (drawn(40) > 0.3))
    report = bn.measure_shift(layer, [x])
    numbers = [report.score, report.noise, report.p_value, *(c.p_value for c in report.channels)]
    assert all(map(math.isfinite, numbers))
    assert 0 <= report.p_value <= 1


def test_the_noise_that_is_taken_off_is_what_chance_gives():
    model = trained(batches=400)
    bn.calibrate(model, [draw(20_000, seed=1)], progress=False)
    found = [bn.measure_shift(model, [draw(32, seed=seed)]) for seed in range(100)]
    raw = [np.mean([c.score for c in r.channels]) for r in found]
    assert abs(np.mean(raw)) < 0.15 * np.mean([r.noise for r in found])


def test_positions_of_an_example_are_not_counted_as_examples():
    layer = nn.BatchNorm2d(4).eval()
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):  # all positions of an example are the same
        x = torch.randn(32, 4, 1, 1, generator=generator).expand(32, 4, 8, 8)
        found.append(bn.measure_shift(layer, [x]).p_value <= 0.05)
    assert np.mean(found) <= 0.09


def test_tokens_in_rows_are_no_examples():
    layer = nn.BatchNorm1d(6).eval()
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(100):
        x = 0.5 * torch.randn(32, 20, 6, generator=generator)
        x = x + 0.75**0.5 * torch.randn(32, 1, 6, generator=generator)
        report = bn.measure_shift(layer, [x], call=lambda model, x: model(x.reshape(-1, 6)))
        assert report.examples == 32
        found.append(report.shifted)
        by_layer = bn.measure_shift(layer, [x.mT])
        assert by_layer.score == pytest.approx(report.score, abs=1e-9)
    assert np.mean(found) <= 0.1


def test_all_layers_may_be_shifted_together_and_none_by_itself():
    model = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(20)]).eval()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)

        def call(module, _, generator=generator):
            for layer in module:
                layer(torch.randn(40, 4, generator=generator) + 0.16)

        report = bn.measure_shift(model, [torch.randn(40, 4)], call=call)
        if report.shifted and not any(layer.shifted for layer in report.layers.values()):
            assert "0 of 20 layers by themselves, but all together" in repr(report)
            assert report.kind in ("input", "semantic")
            return
    pytest.fail("no such report")


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 1.5), (-0.8, 0.8)])
def test_a_shift_of_32_examples_is_seen(shift, scale):
    model = trained()
    report = bn.measure_shift(model, [draw(32, shift, scale, seed=5)])
    assert report.shifted
    assert report.kind == "input"
    assert repr(report).startswith("SHIFT of the inputs: score ")


def test_a_shift_that_begins_late_is_not_one_of_the_inputs():
    model = trained()
    with torch.no_grad():
        model[4].running_mean += 2 * model[4].running_var.sqrt()
    report = bn.measure_shift(model, [draw(64, seed=3)])
    assert (report.shifted, report.kind) == (True, "semantic")
    assert [layer.shifted for layer in report.layers.values()] == [False, True]
    assert "though not of the inputs" in repr(report)
    assert "from '4' on" in repr(report)


@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.3, 3, 100, 1e4])
def test_a_change_of_scale_is_seen_however_large(scale):
    model = nn.BatchNorm1d(6).eval()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    assert bn.measure_shift(model, [scale * x]).shifted


def test_what_is_below_the_tolerance_is_no_shift_however_sure():
    model = bn.BatchNorm1d(3).eval()
    x = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0)) + 0.05
    report = bn.measure_shift(model, x.split(1000), train_batch_size=10**9)
    assert report.p_value < 1e-6
    assert report.score == pytest.approx(0.0025, rel=0.3)
    assert (report.shifted, report.kind) == (False, "none")
    assert bn.measure_shift(model, x.split(1000), train_batch_size=10**9, tolerance=0.001).shifted


def test_the_split_of_the_data_does_not_matter():
    model, x = trained(), draw(120, 0.3, seed=0)
    whole, parts = (bn.measure_shift(model, data) for data in ([x], x.split(7)))
    assert whole.score == pytest.approx(parts.score, rel=1e-6)
    assert whole.noise == pytest.approx(parts.noise, rel=1e-6)


def test_it_is_the_same_every_time_and_leaves_no_trace():
    model = trained().train()
    model[1].eval()
    before, modes = state_of(model), [m.training for m in model.modules()]
    state, x = torch.get_rng_state(), draw(40, seed=0)
    first, second = (bn.measure_shift(model, [x]).to_dict() for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first)) is not None
    assert same(model, before)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())

    def failing(module, batch):
        module(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bn.measure_shift(model, [x], call=failing)
    assert same(model, before)
    assert modes == [m.training for m in model.modules()]


def test_ours_and_those_of_torch_give_the_same():
    theirs = trained()
    ours = trained()
    bn.convert(ours)
    x = draw(50, 0.2, seed=2)
    assert bn.measure_shift(ours, [x]).score == pytest.approx(bn.measure_shift(theirs, [x]).score)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_every_rank(rank):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank](3)
    shape = (40, 3, *[2] * (rank - 2))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert not bn.measure_shift(norm.eval(), [x]).shifted
    assert bn.measure_shift(norm, [x + 1]).shifted


def test_channels_anywhere_and_masks():
    layer = bn.BatchNorm(3, channel_dim=-1).eval()
    x = torch.randn(40, 7, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.arange(40)[:, None] % 8
    padded = x.masked_fill(~mask[:, :, None], 50)

    def call(model, batch):
        return model(batch, mask=mask)

    masked = bn.measure_shift(layer, [padded], call=call)
    assert not masked.shifted
    assert masked.examples == 35  # five of them have no position at all
    assert bn.measure_shift(layer, [padded]).shifted
    plain = bn.BatchNorm(3).eval()
    alike = bn.measure_shift(plain, [x.mT]), bn.measure_shift(layer, [x])
    assert alike[0].score == alike[1].score


def test_examples_that_are_not_finite_are_left_out():
    model = nn.BatchNorm1d(2).eval()
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    x[3, 1], x[9, 0] = math.nan, math.inf
    report = bn.measure_shift(model, [x])
    assert (report.examples, report.not_finite, report.shifted) == (48, 2, False)
    assert "2 examples are not finite, and left out" in repr(report)


def test_a_layer_full_of_noise_does_not_hide_the_others():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, 4, generator=generator).pow(5)

    def call(module, batch):
        module[0](batch)
        module[1](noise)

    model[1].running_var.copy_(noise.var(0))
    model[1].running_mean.copy_(noise.mean(0))
    report = bn.measure_shift(model, [torch.randn(32, 4, generator=generator) + 0.7], call=call)
    assert report.shifted
    assert [layer.shifted for layer in report.layers.values()] == [True, False]


def test_channels_that_never_open_hide_no_shift():
    model = relu_first()
    with torch.no_grad():
        model[1].bias[:20] = -100  # these never open, and others seldom
        for batch in range(100):
            model(draw(32, seed=1000 + batch))
    model.eval()
    found = [bn.measure_shift(model, [draw(64, 1.0, seed=seed)]) for seed in range(5)]
    assert all(report.shifted and math.isfinite(report.p_value) for report in found)
    clean = [bn.measure_shift(model, [draw(64, seed=seed)]) for seed in range(20)]
    assert sum(report.shifted for report in clean) <= 3
    with torch.no_grad(), bn.ShiftDetector(model) as detector:
        for seed in range(5):
            model(draw(32, 1.0, seed=seed))
    assert detector.alarm


def test_a_constant_layer_beside_others():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2)).eval()
    model[0].bias.data.fill_(-100)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    model[2].running_mean.zero_()
    report = bn.measure_shift(model, [x])
    assert report.shifted  # its input is 0, and had a variance of 1
    assert math.isfinite(report.score)
    assert report.layers["2"].shifted


def test_constant_data_and_dead_channels():
    model = nn.BatchNorm1d(2).eval()
    model.running_var[1] = 0
    x = torch.zeros(30, 2)
    x[:, 0] = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert not bn.measure_shift(model, [x]).shifted
    report = bn.measure_shift(model, [torch.ones(30, 2)])
    assert report.shifted
    assert all(math.isfinite(c.score) for c in report.channels)


def test_a_layer_that_is_used_twice_and_one_that_is_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.norm(x))

    report = bn.measure_shift(Twice().eval(), torch.randn(30, 3).split(8))
    assert list(report.layers) == ["norm"]
    assert report.examples == 30
    assert report.left == {"other": "it did not run"}


def test_half_types_and_compiled_models():
    x = draw(40, 0.5, seed=1)
    model = trained()
    expected = bn.measure_shift(model, [x])
    half = bn.measure_shift(trained().bfloat16(), [x.bfloat16()])
    assert half.shifted
    assert half.score == pytest.approx(expected.score, rel=0.1)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert bn.measure_shift(compiled, [x]).score == pytest.approx(expected.score)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "detr"])
def test_published_architectures(name):
    model, example = make_architecture(name)
    twice = [torch.cat([x, x.flip(0)]) if x.is_floating_point() else x for x in example]
    report = bn.measure_shift(model, [twice] * 2, call=called)
    assert report.layers
    assert not set(report.layers) & set(report.left)
    assert all(math.isfinite(layer.score) for layer in report.layers.values())
    with bn.adapting(model), torch.no_grad():
        called(model, twice)


def called(model, batch):
    return model(*batch)


class TestWhatIsWrong:
    """Errors say what was got, and the way out."""

    def test_a_folded_model(self):
        with pytest.raises(ValueError, match=r"no batch norm at all.*before it was folded"):
            bn.measure_shift(nn.Linear(3, 3), [torch.randn(8, 3)])

    def test_one_of_another_package(self):
        model, example = make_architecture("detr")
        with pytest.raises(ValueError, match=r"but DetrFrozenBatchNorm2d\): convert it first"):
            bn.measure_shift(model, [example], call=called)

    def test_no_statistics(self):
        model = nn.BatchNorm1d(3, track_running_stats=False)
        with pytest.raises(ValueError, match="itself: it has no running statistics"):
            bn.measure_shift(model, [torch.randn(8, 3)])

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            ([], "there are none, or the model calls no batch norm"),
            ([torch.randn(1, 3)], "it saw 1 finite examples: two or more"),
        ],
    )
    def test_too_few_examples(self, data, why):
        with pytest.raises(ValueError, match=why):
            bn.measure_shift(nn.BatchNorm1d(3), data)

    def test_statistics_that_are_not_finite(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
        model[0].running_var[1] = math.nan
        x = torch.randn(8, 3)
        with pytest.raises(ValueError, match="no batch norm says anything"):
            bn.measure_shift(model, [x])
        model[0].eps = 1.0
        model[0].running_var[1] = 1.0
        model[1].running_mean[0] = math.inf
        report = bn.measure_shift(model, [x])
        assert report.left == {"1": "its running statistics are no mean and variance: see bn.check"}

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"max_batches": 0}, "max_batches is 0: expected 1 or more"),
            ({"train_batch_size": 0}, "train_batch_size is 0"),
            ({"alpha": 2}, "alpha is 2: expected a number between 0 and 1"),
        ],
    )
    def test_numbers_that_cannot_be(self, settings, why):
        with pytest.raises(ValueError, match=why):
            bn.measure_shift(nn.BatchNorm1d(3), [torch.randn(8, 3)], **settings)

    def test_lazy_layers_and_no_values(self):
        with pytest.raises(ValueError, match="has no size yet, being lazy"):
            bn.measure_shift(nn.LazyBatchNorm1d(), [torch.randn(8, 3)])
        with pytest.raises(ValueError, match="are no mean and variance"):
            bn.measure_shift(nn.BatchNorm1d(3, device="meta"), [torch.randn(8, 3)])
        layer = nn.BatchNorm1d(3)
        layer.running_var[1] = -1
        with pytest.raises(ValueError, match=r"are no mean and variance: see bn\.check"):
            bn.measure_shift(layer, [torch.randn(8, 3)])

    def test_a_batch_of_no_kind(self):
        with pytest.raises(TypeError, match="a batch is a str"):
            bn.measure_shift(nn.BatchNorm1d(3), ["x"])


def test_the_report_of_a_deep_network_fits_a_terminal():
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(30)]).eval()
    for layer in model:
        layer.register_buffer("running_mean", torch.ones(2))
    report = bn.measure_shift(model, [torch.randn(60, 2)])
    lines = repr(report).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("more, which moved less" in line for line in lines)
    assert len(lines) < 20


def test_the_picture_has_every_layer():
    pytest.importorskip("matplotlib")
    report = bn.measure_shift(trained(), [draw(40, 1.0, seed=0)])
    scores, channels = report.plot().axes
    assert len(scores.patches) == 2
    assert [text.get_text() for text in scores.get_yticklabels()] == ["1", "4"]
    assert sum(len(line.get_xdata()) for line in channels.lines) == 20


class TestTests:
    """The tests of hypotheses, held to tables and to simulation."""

    def test_holm(self):
        assert corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert corrected([0.9, 0.8]) == [1.0, 1.0]

    def test_benjamini_and_hochberg(self):
        p = torch.tensor([0.9, 0.01, 0.02, 0.03, 0.5])
        assert discovered(p, 0.05).tolist() == [False, True, True, True, False]
        assert not discovered(torch.tensor([0.2, 0.5]), 0.05).any()

    def test_excess_is_about_standard_normal_and_errs_on_the_safe_side(self):
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(500):
            evidence = Evidence(torch.zeros(6), torch.ones(6), 0.0)
            weights = torch.randn(REPLICATES, 64, generator=generator)
            evidence.add(torch.randn(64, 6, 1, generator=generator), None, weights)
            found.append(excess([evidence.compare()]))
        assert -0.5 < np.median(found) < 0.2
        for level in (0.1, 0.05, 0.01):
            share = np.mean([p_value(z) <= level for z in found])
            assert share <= level + 2 * math.sqrt(level / 500)
