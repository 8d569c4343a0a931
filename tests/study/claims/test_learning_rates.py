"""Claim 3: made-up runs give the limits that they must, and the verdict turns with them."""

import pytest
from study.small import plan_of, result, small_data, small_plan, studied, without_normalization

from batchnorm.study.claims import judge
from batchnorm.study.claims.learning_rates import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.pictures import png
from batchnorm.study.store import Store

RATES = (0.1, 1.0, 10.0, 100.0)


def judged(store, plain, normalized, rates=RATES):
    """A judgement of runs that train up to a rate, and break off beyond it."""
    plan = plan_of(*rates)
    for run in CLAIM.tasks(plan, "conv"):
        trains = run.learning_rate <= (normalized if run.recipe.normalized else plain)
        ends = result([0.1, 0.9, 0.9, 0.9]), result([0.9], "the loss was nan at step 2")
        store.add(run, ends[0] if trains else ends[1])
    return judge(CLAIM, ["conv"], plan, store)


def test_a_higher_limit_holds(store):
    judgement = judged(store, 1.0, 10.0)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_, found.effect) == ("1", "10", "10× (10–10)")
    (chart,) = judgement.charts
    assert figure(chart.panels[0])["data"]
    assert png(chart)


def test_a_limit_beyond_the_grid_is_said(store):
    assert judged(store, 1.0, 1000.0).findings[0].with_ == "≥ 100"


@pytest.mark.parametrize("normalized", [0.0, 0.1, 1.0])
def test_the_same_or_a_lower_limit_does_not(store, normalized):
    assert judged(store, 1.0, normalized).answer == "does not hold"


@pytest.mark.parametrize("normalized", [0.0, 10.0])
def test_without_a_plain_run_that_trains_it_is_not_measured(store, normalized):
    assert judged(store, 0.0, normalized).answer == "not measured"


def test_one_rate_is_no_grid(store):
    assert "one rate" in judged(store, 1.0, 1.0, rates=(1.0,)).findings[0].sentence


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    data = small_data()
    plan = small_plan(data, seeds=range(5), steps=60, rates=(0.1, 0.3, 1.0, 3.0))
    assert studied(CLAIM, "relu", plan, data, store).answer == "holds"
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        assert studied(CLAIM, "relu", plan, data, fresh).answer == "does not hold"
