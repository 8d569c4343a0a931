"""Claim 13: what a change of scale in the first layer does to a network."""

from dataclasses import replace

import pytest
import torch
from study.small import result, small_data, small_plan, studied, without_normalization
from torch import nn

import batchnorm as bn
from batchnorm.study.claims import judge
from batchnorm.study.claims.scale_invariance import CLAIM, scaled_predictions
from batchnorm.study.interactive import figure
from batchnorm.study.observation import State
from batchnorm.study.pictures import png
from batchnorm.study.store import Store

DATA = small_data()
PLAN = small_plan(DATA, seeds=(0, 1, 2))


def looked(model, last=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    batch = x, torch.arange(200) % 4
    return scaled_predictions(State(model, 9, last, 1.0, batch, batch, batch, DATA))


def test_it_looks_at_the_end_alone():
    assert looked(nn.Linear(3, 4), last=False) is None


def test_a_linear_map_gives_100_times_as_much():
    seen = looked(nn.Linear(3, 4))
    for change, changed, before, after in seen.values():
        assert change == pytest.approx(99)
        assert changed == 0
        assert before == after


def test_the_moments_of_the_batch_undo_it_and_old_ones_do_not():
    torch.manual_seed(0)
    layers = nn.Linear(3, 8), bn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    model = nn.Sequential(*layers)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    seen = looked(model)
    assert seen["batch"][0] < 1e-3
    assert seen["calibrated"][0] < 1e-3
    assert seen["running"][0] > 1
    assert model.training
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def judged(store, plain, ours, reason="", accuracies=(90.0, 90.0)):
    """A judgement of made-up changes of the outputs, without normalization and with it."""
    without, with_ = accuracies
    for run in CLAIM.tasks(PLAN, "relu"):
        off = 0.001 * run.seed
        if run.recipe.normalized:
            seen = {mode: [ours + off, 0.0, with_, with_] for mode in ("batch", "calibrated")}
            seen["running"] = [50.0, 40.0, 90.0, 60.0]
        else:
            moments = ("batch", "running", "calibrated")
            seen = {mode: [plain, 30.0, without, 70.0] for mode in moments}
        observed = {"scaled_predictions": [[8, seen]]}
        store.add(run, result([0.9], reason, observed=observed))
    return judge(CLAIM, ["relu"], PLAN, store)


@pytest.mark.parametrize(
    ("plain", "ours", "checks"),
    [
        (99.0, 0.0, [True, True]),
        (99.0, 0.009, [False, True]),  # for one seed it is more than 1%
        (0.001, 0.0, [True, False]),
        (0.01, 0.02, [False, False]),
    ],
)
def test_each_check_can_fail(store, plain, ours, checks):
    (found,) = judged(store, plain, ours).findings
    assert list(found.checks.values()) == checks
    assert "40.0% of them change, and the accuracy goes from 90.0% to 60.0%" in found.sentence


def test_a_network_that_learned_nothing_is_not_measured(store):
    judgement = judged(store, 99.0, 0.0, accuracies=(90, 10))
    assert judgement.answer == "not measured"
    assert judgement.findings[0].sentence == "The normalized relu network learned nothing."


def test_a_plain_network_that_learned_nothing_is_no_comparison(store):
    (found,) = judged(store, 0.0, 0.0, accuracies=(10, 90)).findings
    assert found.checks == {"outputs stay, with the batch's moments": True}


def test_a_run_that_broke_off_is_not_measured(store):
    assert judged(store, 99.0, 0.0, reason="the loss was nan").answer == "not measured"


def test_the_worked_example_is_a_part(store):
    judgement = studied(CLAIM, "worked example", PLAN, DATA, store)
    assert judgement.answer == "holds"
    (chart,) = judgement.charts
    assert figure(chart.panels[0])["data"]
    assert png(chart)


def test_the_charts_are_drawn(store):
    (chart,) = judged(store, 99.0, 0.0).charts
    assert [panel.choice for panel in chart.panels] == ["outputs", "predictions"]
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    # Rectifiers only scale with their inputs: the outputs tell it, the predictions do not.
    plan = small_plan(DATA, seeds=(0, 1, 2), steps=150)
    networks = {**plan.networks, "relu": replace(plan.networks["relu"], usual_rate=0.1)}
    plan = replace(plan, networks=networks)
    assert studied(CLAIM, "relu", plan, DATA, store).answer == "holds"
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        turned = studied(CLAIM, "relu", plan, DATA, fresh)
    assert turned.answer == "does not hold"
    changed = {row.measure: row.values for row in turned.findings[0].rows}
    assert max(changed["predictions that change, %"]) < 20
