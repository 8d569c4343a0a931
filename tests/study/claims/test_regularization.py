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


CHECKS = (
    "a smaller gap of the loss",
    "a smaller gap at the plain network's rate",
    "a higher held-out accuracy",
    "dropout adds less to it than without",
)


def judged(
    store, plain=0.80, dropout=0.85, ours=0.90, both=0.91, gap=0.4, at_plains=0.5, reason=""
):
    """A judgement of held-out accuracies, and of the normalized network's gaps of the loss.

    The plain network is best with the rate 0.1, the normalized one with 0.3; its gap is 0.6.
    """
    plan = plan_of(0.1, 0.3)
    for run in CLAIM.tasks(plan, "conv"):
        recipe = run.recipe
        if recipe.normalized:
            order = 0.0 if recipe.dropout == "before" else 0.01  # one order is worse
            high, suits = (both - order if recipe.dropout else ours), 0.3
            wide = gap if run.learning_rate == suits else at_plains
        else:
            high, suits, wide = (dropout if recipe.dropout else plain), 0.1, 0.6
        end = high + 0.001 * run.seed if run.learning_rate == suits else 0.15
        of = {"train_accuracy": 1.0, "train_loss": 0.1, "test_loss": 0.1 + wide}
        store.add(run, result([end - 0.03, end, end + 0.03], reason, **of))
    return judge(CLAIM, ["conv"], plan, store)


def failed(judgement):
    """The checks that do not hold."""
    return [name for name, held in judgement.findings[0].checks.items() if not held]


def test_it_holds_where_the_gap_is_smaller_and_dropout_adds_less(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert tuple(found.checks) == CHECKS
    assert (found.without, found.with_, found.effect) == ("0.6", "0.4", "-0.2 (-0.2 to -0.2)")
    assert "+5.00 points" in found.sentence
    assert "+1.00 with it (dropout, norm): a difference of -4 points" in found.sentence
    rows = {(row.condition, row.measure): row.values for row in found.rows}
    # The gap of the accuracy is that at the last step, which is 3 points above the mean.
    assert rows["plain", "train-test gap, points"] == pytest.approx([17.0, 16.9, 16.8])
    assert rows["plain", "held-out accuracy, %"] == pytest.approx([80.0, 80.1, 80.2])
    assert rows["batchnorm, rate 0.1", "train-test gap of the loss"] == pytest.approx([0.5] * 3)
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
        ({"gap": 0.7}, CHECKS[:1]),
        ({"at_plains": 0.7}, CHECKS[1:2]),
        ({"ours": 0.79, "both": 0.80}, CHECKS[2:3]),
        ({"both": 0.96}, CHECKS[3:]),
        ({"dropout": 0.80}, CHECKS[3:]),  # as little is added without: no less need of it
        ({"gap": 0.6, "at_plains": 0.6, "ours": 0.8, "both": 0.85}, CHECKS),
    ],
)
def test_each_check_turns(store, changes, expected):
    judgement = judged(store, **changes)
    assert failed(judgement) == list(expected)
    assert judgement.answer == ("does not hold" if expected == CHECKS else "depends")


def test_nothing_learned_is_not_measured(store):
    assert judged(store, plain=0.12).answer == "not measured"


def test_runs_that_broke_off_are_not_measured(store):
    judgement = judged(store, reason="the loss was nan at step 3")
    assert judgement.answer == "not measured"
    assert "the loss was nan at step 3" in judgement.findings[0].sentence


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    plan = small_plan(DATA, seeds=range(3), steps=30, rates=(0.3,))
    turned = "a higher held-out accuracy"
    assert turned not in failed(studied(CLAIM, "conv", plan, DATA, store))
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        assert failed(studied(CLAIM, "conv", plan, DATA, fresh)) == list(CHECKS)


def test_it_is_not_measured_by_shuffled_labels(store):
    labels = np.random.default_rng(0).permutation(DATA.train_labels)
    shuffled = replace(DATA, name="shuffled", train_labels=labels)
    plan = small_plan(shuffled, steps=20, rates=(0.1,))
    assert studied(CLAIM, "relu", plan, shuffled, store).answer == "not measured"
