"""Claim 6: made-up gaps and accuracies, and the verdict that turns with them."""

from dataclasses import replace

import numpy as np
import pytest
from study.small import plan_of, result, small_data, small_plan, studied, without_normalization

from batchnorm.study.claims import judge
from batchnorm.study.claims.regularization import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.pictures import png
from batchnorm.study.store import Store

DATA = small_data()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as made:
        yield made


def judged(store, plain=0.80, ours=0.90, both=0.90, train=1.0, loss=0.5, rate=0.1, reason=""):
    """A judgement of held-out accuracies, of the normalized network's loss, and its best rate."""
    plan = plan_of(0.1, 0.3)
    for run in CLAIM.tasks(plan, "conv"):
        recipe = run.recipe
        last = both if recipe.dropout == "before" else both - 0.01
        high = (last if recipe.dropout else ours) if recipe.normalized else plain
        suits = rate if recipe.normalized else 0.1
        end = high + 0.001 * run.seed if run.learning_rate == suits else 0.15
        losses = {"train_loss": 0.1, "test_loss": loss if recipe.normalized else 0.7}
        store.add(run, result([end] * 4, reason, train_accuracy=train, **losses))
    return judge(CLAIM, ["conv"], plan, store)


def checks(judgement):
    return list(judgement.findings[0].checks.values())


def test_it_holds_where_the_gap_is_smaller_and_dropout_adds_nothing(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_, found.effect) == ("19.90", "9.90", "-10 (-10 to -10)")
    assert "dropout, norm" in found.sentence
    gaps = {row.condition: row.values for row in found.rows if "gap of the loss" in row.measure}
    assert gaps["plain"] == pytest.approx([0.6] * 3)
    assert gaps["batchnorm"] == pytest.approx([0.4] * 3)
    assert len(judgement.charts) == 2
    for chart in judgement.charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


def test_all_networks_see_few_examples_and_dropout_comes_in_both_orders():
    tasks = CLAIM.tasks(plan_of(0.1, 0.3, seeds=(0,)), "conv")
    assert len(tasks) == len(set(tasks)) == 5 * 2
    assert {run.examples for run in tasks} == {500}
    assert {run.recipe.dropout for run in tasks if run.recipe.normalized} == {"", "after", "before"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": 0.8}, [True, True, False, True, True]),
        ({"rate": 0.3}, [True, False, True, True, True]),
        ({"both": 0.92}, [True, True, True, True, False]),
        ({"ours": 0.80, "both": 0.80}, [False, False, True, False, True]),
        ({"ours": 0.70, "both": 0.80, "loss": 0.8}, [False, False, False, False, False]),
    ],
)
def test_each_check_turns(store, changes, expected):
    judgement = judged(store, **changes)
    assert checks(judgement) == expected
    assert judgement.answer == ("depends" if any(expected) else "does not hold")


def test_nothing_learned_is_not_measured(store):
    assert judged(store, plain=0.12).answer == "not measured"


def test_runs_that_broke_off_are_not_measured(store):
    judgement = judged(store, reason="the loss was nan at step 3")
    assert judgement.answer == "not measured"
    assert "the loss was nan at step 3" in judgement.findings[0].sentence


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    plan = small_plan(DATA, seeds=range(3), steps=30, rates=(0.3,))
    more_accurate = "a higher held-out accuracy"
    assert studied(CLAIM, "conv", plan, DATA, store).findings[0].checks[more_accurate]
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        (found,) = studied(CLAIM, "conv", plan, DATA, fresh).findings
        assert not any(held for name, held in found.checks.items() if "dropout" not in name)


def test_it_is_not_measured_by_shuffled_labels(store):
    labels = np.random.default_rng(0).permutation(DATA.train_labels)
    shuffled = replace(DATA, name="shuffled", train_labels=labels)
    plan = small_plan(shuffled, steps=20, rates=(0.1,))
    assert studied(CLAIM, "relu", plan, shuffled, store).answer == "not measured"
