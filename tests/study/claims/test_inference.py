"""Claim 17: predictions that depend on the batch are seen to, and the verdict turns with it."""

import math
from dataclasses import replace

import pytest
import torch
from study.small import plan_of, small_data, small_plan, studied
from torch import nn

import batchnorm as bn
from batchnorm.study import recipes
from batchnorm.study.claims import judge
from batchnorm.study.claims.inference import CLAIM
from batchnorm.study.descent import step
from batchnorm.study.interactive import figure
from batchnorm.study.measures import inference as predicted
from batchnorm.study.measures.inference import at_inference
from batchnorm.study.networks import NETWORKS, build, norms
from batchnorm.study.observation import Result, State
from batchnorm.study.pictures import png
from batchnorm.study.recipes import NORMALIZED

DATA = small_data()


def state_of(model, last=True):
    """What a probe sees of a network at the end of a run."""
    held_out = torch.from_numpy(DATA.test_inputs), torch.from_numpy(DATA.test_labels)
    batch = torch.from_numpy(DATA.train_inputs[:60]), torch.from_numpy(DATA.train_labels[:60])
    return State(model, 5, last, 1.0, batch, held_out, held_out, DATA)


def trained(name, steps=20):
    model = build(NETWORKS[name], NORMALIZED, DATA.shape, 10, seed=0)
    x, y = torch.from_numpy(DATA.train_inputs), torch.from_numpy(DATA.train_labels)
    for _ in range(steps):
        step(model, x, y, 0.3)
    return model


class TestTheProbe:
    @pytest.mark.parametrize(("name", "refused"), [("sigmoid", True), ("conv", False)])
    def test_an_example_alone(self, name, refused):
        model = trained(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        seen = at_inference(state_of(model))
        assert seen["alone"] < 1e-5
        assert seen["refused"] is refused
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        assert model.training
        assert at_inference(state_of(model, last=False)) is None

    def test_the_population_is_all_training_examples(self):
        model = trained("sigmoid")
        z = model[0][:2](torch.from_numpy(DATA.train_inputs)).detach()
        mean, var = z.mean(0), z.var(0)
        calibrated = norms(predicted._calibrated(state_of(model)))[0]
        torch.testing.assert_close(calibrated.running_mean, mean)
        torch.testing.assert_close(calibrated.running_var, var)
        running = norms(model)[0]
        running.running_mean.copy_(mean + 0.5 * var.sqrt())
        running.running_var.copy_(2 * var)
        distances = predicted._distances(running, calibrated)
        assert distances == pytest.approx((0.5, math.log(2)), rel=1e-3)

    def test_running_averages_that_are_off_cost_accuracy(self):
        model = trained("sigmoid", steps=100)
        good = at_inference(state_of(model))
        for layer in norms(model):
            layer.running_mean.add_(10)
        bad = at_inference(state_of(model))
        assert bad["population"] == good["population"] > 0.7
        assert good["running"] > 0.7
        assert bad["running"] < 0.5
        assert bad["means"] > 5 > 1 > good["means"]

    def test_what_depends_on_its_companions_is_seen(self):
        class Companions(nn.Module):
            def forward(self, x):
                return x - x.mean(0)

        batch = torch.arange(10.0)[:, None, None, None], torch.zeros(10, dtype=torch.int64)
        model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), Companions())
        assert predicted._alone(model, batch[0]) == pytest.approx(1)
        assert 0 < predicted._changed(model, batch[0], 5) <= 1
        assert predicted._changed(model[:2], batch[0], 5) == 0
        assert predicted._changed(model[:2], batch[0], 60) == 0


def judged(store, alone=1e-7, lost=0.0, reason="", refused=True):
    """A judgement, where running averages of the usual momentum cost so many points."""
    plan = plan_of(1.0)
    for run in CLAIM.tasks(plan, "conv"):
        usual = run.recipe.momentum == 0.1
        seen = {
            "alone": alone if usual else 1.0,
            "refused": refused,
            "changed": 0.02,
            "means": 0.01 / run.recipe.momentum,
            "variances": 0.02 / run.recipe.momentum,
            "running": 0.9 + 0.001 * run.seed - (lost / 100 if usual else 0.5),
            "population": 0.9,
        }
        observed = {"at_inference": [[9, seen]]}
        store.add(run, Result(losses=[1.0], observed=observed, reason=reason))
    return judge(CLAIM, ["conv"], plan, store)


def test_the_same_alone_and_no_point_lost_holds(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_, found.effect) == ("90.0%", "90.1%", "+0.10 points")
    assert "one alone is refused" in found.sentence
    values = {(row.condition, row.measure): row for row in found.rows}
    slow = values["momentum 0.001", "accuracy with running averages, %"]
    assert slow.effect.value == pytest.approx(-49.9)
    assert values["momentum 0.5", "running means, std off"].values == pytest.approx([0.02] * 3)
    (chart,) = judgement.charts
    distance, accuracy = chart.panels
    assert distance.series[0].y == pytest.approx([10, 1, 0.1, 0.02])
    assert accuracy.series[0].y == pytest.approx([40.1, 40.1, 90.1, 40.1])
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alone": 1e-3}, [False, True]),
        ({"lost": 1.5}, [True, False]),
        ({"lost": -1.5}, [True, False]),
        ({"alone": 1.0, "lost": 5.0}, [False, False]),
    ],
)
def test_each_check_turns(store, changes, expected):
    assert list(judged(store, **changes).findings[0].checks.values()) == expected


def test_positions_are_moments_of_their_own(store):
    assert "of its own positions" in judged(store, refused=False).findings[0].sentence


def test_runs_that_broke_off_are_not_measured(store):
    judgement = judged(store, reason="the loss was nan at step 3")
    assert judgement.answer == "not measured"
    assert "the loss was nan at step 3" in judgement.findings[0].sentence
    assert judgement.charts == []


def test_the_momentum_changes_nothing_but_the_running_averages(store):
    plan = small_plan(DATA, steps=30)
    studied(CLAIM, "sigmoid", plan, DATA, store)
    runs = [run for run in CLAIM.tasks(plan, "sigmoid") if run.seed == 0]
    seen = [store[run].seen(at_inference)[0] for run in runs]
    assert len({tuple(store[run].losses) for run in runs}) == 1
    assert len({one["population"] for one in seen}) == 1
    assert seen[0]["means"] > seen[1]["means"] > seen[2]["means"]  # from 0.001 to 0.1


@pytest.mark.parametrize("running", [True, False])
def test_it_is_the_running_averages_that_do_it(store, monkeypatch, running):
    class BatchAlways(bn.BatchNorm1d):
        """Batch normalization that uses the moments of the batch in evaluation, too."""

        def forward(self, x):
            if self.training or len(x) == 1:
                return super().forward(x)
            return (x - x.mean(0)) / (x.var(0) + self.eps).sqrt() * self.weight + self.bias

    if not running:
        monkeypatch.setattr(recipes, "norm_layer", lambda _, features, *__: BatchAlways(features))
    plan = replace(small_plan(DATA, steps=20), seeds=(0,))
    (found,) = studied(CLAIM, "sigmoid", plan, DATA, store).findings
    assert found.checks["the same outputs alone and in a batch"] is running
