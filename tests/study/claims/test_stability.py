"""Claim 4: shares of a made-up grid, and the verdict that turns with them."""

import pytest
from study.small import plan_of, result, small_data, small_plan, studied, without_normalization

from batchnorm.study.claims import judge
from batchnorm.study.claims.stability import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.pictures import png
from batchnorm.study.store import Store

RATES = (0.1, 0.3, 1.0, 3.0)  # of which every other one is tried: 2 rates, 3 initializations


def judged(store, accuracy):
    """A judgement of runs that end with an accuracy, by normalized, initialization, rate, seed."""
    plan = plan_of(*RATES)
    for run in CLAIM.tasks(plan, "conv"):
        recipe = run.recipe
        end = accuracy(recipe.normalized, recipe.initialization, run.learning_rate, run.seed)
        store.add(run, result([end] * 4 if end else [0.9], "" if end else "the loss was nan"))
    return judge(CLAIM, ["conv"], plan, store)


def test_the_grid_has_every_other_rate_and_three_initializations():
    plan = plan_of(*RATES, seeds=(0,))
    tasks = CLAIM.tasks(plan, "conv")
    assert len(tasks) == len(set(tasks)) == 2 * 2 * 3
    assert {run.learning_rate for run in tasks} == {0.1, 1.0}
    shared = set(tasks) & {plan.run("conv", run.recipe, run.learning_rate) for run in tasks}
    assert {run.recipe.initialization for run in shared} == {"", "small", "large"}


def test_it_holds_where_more_choices_are_good(store):
    judgement = judged(
        store, lambda ours, start, rate, _: 0.95 if ours or (start, rate) == ("", 0.1) else None
    )
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_) == ("17%", "100%")
    assert found.effect == "+83.3 (+83.3 to +83.3)"
    assert found.rows[0].values == pytest.approx([100 / 6] * 3)
    ranked, by_rate = judgement.charts
    assert ranked.panels[0].series[0].y == pytest.approx([95, 0, 0, 0, 0, 0])
    assert [panel.choice for panel in by_rate.panels] == ["own", "small", "large"]
    for chart in judgement.charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


def test_two_points_below_the_best_is_near_and_more_is_not(store):
    ends = {0.1: 0.9, 1.0: 0.881}
    judgement = judged(store, lambda ours, _, rate, __: ends[rate] - (0.0 if ours else 0.015))
    first, second, own, _ = judgement.findings[0].rows
    assert (first.values[0], second.values[0], own.values[0]) == (50, 100, 100)


def test_it_depends_where_plain_is_as_steady_but_less_accurate(store):
    judgement = judged(store, lambda ours, *_: 0.95 if ours else 0.9)
    assert judgement.answer == "depends"
    assert list(judgement.findings[0].checks.values()) == [True, False]


def test_it_does_not_hold_where_seeds_disagree(store):
    judgement = judged(store, lambda ours, _, __, seed: 0.95 if ours == (seed > 0) else 0.1)
    assert judgement.answer == "does not hold"


def test_nothing_learned_is_not_measured(store):
    assert judged(store, lambda *_: 0.12).answer == "not measured"


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    data = small_data()
    plan = small_plan(data, seeds=range(3), steps=30, rates=(0.1, 0.3, 1.0))
    assert studied(CLAIM, "tanh", plan, data, store).answer == "holds"
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        assert studied(CLAIM, "tanh", plan, data, fresh).answer == "does not hold"
