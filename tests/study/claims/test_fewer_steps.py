"""Claim 1: made-up curves give the steps that they must, and the verdict turns with them."""

import pytest
from study.small import (
    plan_of,
    result,
    rising,
    small_plan,
    studied,
    without_normalization,
)

from batchnorm.study.claims import judge
from batchnorm.study.claims.fewer_steps import CLAIM, steps_until
from batchnorm.study.data import load
from batchnorm.study.interactive import figure
from batchnorm.study.observation import Result
from batchnorm.study.pictures import png
from batchnorm.study.store import Store


def judged(plan, store, plain, normalized, high=None):
    """A judgement of accuracies that rise at a step, later from seed to seed."""
    for run in CLAIM.tasks(plan, "conv"):
        step = normalized if run.recipe.normalized else plain
        top = (0.9 if run.learning_rate == 1.0 else 0.8) if high is None else high(run)
        store.add(run, result(rising(step + run.seed, high=top)))
    return judge(CLAIM, ["conv"], plan, store)


def test_the_steps_until():
    made = result([0.1, 0.5, 0.4, 0.6])
    assert [steps_until(made, goal) for goal in (0.1, 0.5, 0.6)] == [1, 2, 4]
    assert steps_until(made, 0.7) == float("inf")
    assert steps_until(Result(), 0.0) == float("inf")


def test_fewer_steps_hold(store):
    judgement = judged(plan_of(0.5, 1.0), store, 80, 10)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_) == ("81", "11")
    expected = (80 * 81 * 82 / (10 * 11 * 12)) ** (1 / 3)
    assert found.effect.startswith(f"{expected:.3g}×")
    assert found.rows[1].values == [10, 11, 12]
    assert "rate 1" in found.rows[0].measure
    for chart in judgement.charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


def test_a_rate_of_its_own_has_a_row_only_where_it_is_another_one(store, tmp_path):
    (found,) = judged(plan_of(0.5, 1.0), store, 80, 10).findings
    assert [row.condition for row in found.rows] == ["plain", "batchnorm"]
    plan = plan_of(0.5, 1.0)
    with Store(tmp_path / "own") as fresh:
        for run in CLAIM.tasks(plan, "conv"):
            # Plain is best with 0.5, of which batchnorm needs 40 steps, and 10 with 1.
            suits = 0.9 if run.recipe.normalized or run.learning_rate == 0.5 else 0.8
            step = 80 if not run.recipe.normalized else 40 if run.learning_rate == 0.5 else 10
            fresh.add(run, result(rising(step, high=suits)))
        (found,) = judge(CLAIM, ["conv"], plan, fresh).findings
    assert [row.measure[-3:] for row in found.rows] == ["0.5", "0.5", "e 1"]
    assert found.rows[-1].values == [10, 10, 10]


@pytest.mark.parametrize("normalized", [50, 80])
def test_as_many_or_more_steps_do_not(store, normalized):
    assert judged(plan_of(1.0), store, 50, normalized).answer == "does not hold"


def test_a_run_that_never_gets_there_counts_with_all_its_steps(store):
    judgement = judged(
        plan_of(1.0), store, 49, 9, lambda run: 0.8 + 0.1 * (run.recipe.norm == "plain")
    )
    assert judgement.findings[0].with_ == "100"
    assert judgement.answer == "does not hold"


def test_nothing_learned_is_not_measured(store):
    assert judged(plan_of(1.0), store, 50, 10, lambda _: 0.12).answer == "not measured"


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    data = load("digits")
    plan = small_plan(data, seeds=range(5), steps=150, rates=(0.1,))
    assert studied(CLAIM, "relu", plan, data, store).answer == "holds"
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        assert studied(CLAIM, "relu", plan, data, fresh).answer == "does not hold"
