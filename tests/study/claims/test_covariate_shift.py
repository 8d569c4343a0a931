"""Claim 8: shifts of the inputs, their score, and what adaptation wins back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from study.small import result, small_data, small_plan, studied
from torch import nn

import batchnorm as bn
from batchnorm.study.claims import judge
from batchnorm.study.claims.covariate_shift import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.measures import covariate_shift as under_shift
from batchnorm.study.observation import State
from batchnorm.study.pictures import png
from batchnorm.study.shifts import SEVERITIES, SHIFTS
from batchnorm.study.store import Store

DATA = small_data()
PLAN = small_plan(DATA, seeds=(0, 1, 2))


def test_the_score_is_that_of_the_toolkit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), bn.BatchNorm1d(10))
    bn.calibrate(model, [torch.from_numpy(DATA.train_inputs)], progress=False)
    seen = look(model, DATA)
    tried = torch.from_numpy(DATA.test_inputs[25:33])
    report = bn.measure_shift(model, [tried], train_batch_size=60)
    assert seen["clean"][2:] == [report.score, report.shifted]
    assert look(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), DATA)["clean"][2:] == [0, 0]


def test_few_clean_samples_are_flagged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), bn.BatchNorm1d(10))
    bn.calibrate(model, [torch.from_numpy(DATA.test_inputs[25:])], progress=False)
    assert look(model, DATA)["alarms"] <= 0.1
    brighter = DATA.test_inputs.copy()
    brighter[25:] += 4
    assert look(model, replace(DATA, test_inputs=brighter))["alarms"] > 0.5


def look(model, data, last=True):
    held_out = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_labels)
    return under_shift.shifted_and_adapted(State(model, 9, last, 1.0, *[held_out] * 3, data))


def test_it_looks_at_both_halves_and_leaves_the_network_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), bn.BatchNorm1d(10))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert look(model, DATA, last=False) is None
    seen = look(model, DATA)
    assert set(seen) == {*SHIFTS, "clean", "alarms"}
    assert [len(seen[name]) for name in SHIFTS] == [len(SEVERITIES)] * len(SHIFTS)
    assert model.training
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    # Adapted to the half that is there for it, and tried on the other.
    tried = torch.from_numpy(DATA.test_inputs[25:]), torch.from_numpy(DATA.test_labels[25:])
    bn.adapt(model.eval(), [torch.from_numpy(DATA.test_inputs[:25])], progress=False)
    right = (model(tried[0]).argmax(1) == tried[1]).double().mean()
    assert seen["clean"][1] == pytest.approx(100 * float(right))


def test_features_bear_the_shifts_that_need_no_picture():
    features = replace(
        DATA,
        train_inputs=DATA.train_inputs.reshape(120, 64, 1, 1),
        test_inputs=DATA.test_inputs.reshape(50, 64, 1, 1),
    )
    seen = look(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), features)
    assert set(seen) == {
        "brightness",
        "contrast",
        "noise",
        "inversion",
        "clean",
        "alarms",
    }


def judged(store, worst, adapted, strong=1.0, alarms=0.05, clean=90.0, reason="", plain_reason=""):
    """A judgement of made-up looks: of all shifts, and another accuracy adapted to inversion."""
    for run in CLAIM.tasks(PLAN, "relu"):
        seen = {name: [[worst, adapted, strong, strong > 0.2]] * len(SEVERITIES) for name in SHIFTS}
        seen["inversion"] = [[worst, worst, strong, strong > 0.2]] * len(SEVERITIES)
        seen.update(clean=[clean, clean, 0.1, 0.0], alarms=alarms)
        why = reason if run.recipe.normalized else plain_reason
        store.add(run, result([0.9], why, observed={"shifted_and_adapted": [[8, seen]]}))
    return judge(CLAIM, ["relu"], PLAN, store)


@pytest.mark.parametrize(
    ("made", "checks"),
    [
        ({"worst": 40.0, "adapted": 50.0}, [True, True, True]),
        ({"worst": 40.0, "adapted": 50.0, "alarms": 0.2}, [True, False, True]),
        ({"worst": 40.0, "adapted": 80.0}, [True, True, False]),
        ({"worst": 40.0, "adapted": 50.0, "strong": 0.15}, [True, False, True]),
        ({"worst": 86.0, "adapted": 50.0}, [False, True, False]),
        ({"worst": 90.0, "adapted": 90.0, "strong": 0.1}, [False, False, False]),
    ],
)
def test_each_check_can_fail(store, made, checks):
    (found,) = judged(store, **made).findings
    assert list(found.checks.values()) == checks


def test_the_sentence_tells_the_shifts_apart(store):
    (found,) = judged(store, 40.0, 80.0).findings
    others = "brightness, contrast, noise, blur and rotation"
    assert f"won back under inversion, about half or more under {others}." in found.sentence
    assert (found.without, found.with_) == ("90.0%", "40.0%")


def test_the_charts_are_drawn(store):
    accuracies, scores = judged(store, 40.0, 50.0).charts
    assert [panel.choice for panel in accuracies.panels] == ["all shifts", *SHIFTS]
    for chart in (accuracies, scores):
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


def test_nothing_learned_is_not_measured(store):
    assert judged(store, 10.0, 10.0, clean=12.0).answer == "not measured"


def test_a_run_that_broke_off_is_not_measured(store):
    assert judged(store, 40.0, 50.0, reason="the loss was nan").answer == "not measured"


def test_a_plain_network_that_broke_off_is_left_out(store):
    judgement = judged(store, 40.0, 50.0, plain_reason="the loss was nan")
    assert judgement.answer == "holds"
    assert "without normalization" not in judgement.findings[0].sentence
    assert len(judgement.charts[0].panels[0].series) == 2


def test_it_turns_where_nothing_is_shifted(store, tmp_path, monkeypatch):
    plan = small_plan(DATA, seeds=(0, 1, 2), steps=40)
    (found,) = studied(CLAIM, "relu", plan, DATA, store).findings
    assert found.checks["fails under the strongest shifts"]
    flagged = [row.values for row in found.rows if row.condition == "shifts from severity 3 on"]
    assert np.mean(flagged) > 60
    monkeypatch.setattr(under_shift, "shift", lambda inputs, *_, **__: np.array(inputs))
    with Store(tmp_path / "unshifted") as fresh:
        assert studied(CLAIM, "relu", plan, DATA, fresh).answer == "does not hold"
