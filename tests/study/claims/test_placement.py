"""Claim 9: made-up accuracies by place, each with its own rate, and the verdict by them."""

import pytest
from study.small import plan_of, result, small_data, small_plan, studied, without_normalization

from batchnorm.study.claims import judge
from batchnorm.study.claims.placement import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.measures.rates import at_own_rate, few_rates, told_steps, tried
from batchnorm.study.measures.runs import best
from batchnorm.study.pictures import png
from batchnorm.study.recipes import PLAIN
from batchnorm.study.store import Store


def judged(store, **ends):
    """A judgement of runs that end as told; by the higher rate only, where they are normalized."""
    plan = plan_of(0.1, 0.3)
    for run in CLAIM.tasks(plan, "conv"):
        name = run.recipe.place if run.recipe.normalized else "plain"
        suits = (run.learning_rate == 0.3) == run.recipe.normalized
        store.add(run, result([ends[name] + 0.001 * run.seed if suits else 0.15] * 4))
    return judge(CLAIM, ["conv"], plan, store)


def test_the_rates_are_the_usual_one_and_the_next():
    assert few_rates(plan_of(0.3, 0.1, 1.0, 3.0, 10.0), "conv") == [0.3, 1.0, 3.0]
    assert few_rates(plan_of(0.3), "conv") == [0.3]


def test_each_variant_has_its_own_rate(store):
    plan = plan_of(0.1, 0.3)
    by_rate = tried(plan, "conv", PLAIN, 7)
    for runs, seeds in zip(by_rate, ([0.9, 0.1, 0.1], [0.4, 0.4, 0.4]), strict=True):
        for run, end in zip(runs, seeds, strict=True):
            assert run.examples == 7
            store.add(run, result([end]))
    assert {run.learning_rate for run in at_own_rate(store, by_rate)} == {0.3}


def test_the_best_rate_is_by_the_quantity_that_is_told(store):
    plan = plan_of(0.1, 0.3)
    by_rate = tried(plan, "conv", PLAIN)
    for runs, ends in zip(by_rate, ([0.5] * 4, [0.9, 0.1, 0.1, 0.1]), strict=True):
        for run in runs:
            store.add(run, result(ends))
    assert at_own_rate(store, by_rate)[0].learning_rate == 0.1
    assert at_own_rate(store, by_rate, best)[0].learning_rate == 0.3


def test_the_steps_are_told():
    assert told_steps(["sigmoid", "conv"]) == "sigmoid 900, conv 200"


@pytest.mark.parametrize(
    ("before", "after", "answer"),
    [
        (0.9, 0.85, "holds"),
        (0.9, 0.7, "depends"),
        (0.7, 0.9, "depends"),
        (0.8, 0.7, "does not hold"),
    ],
)
def test_both_places_must_be_better_than_none(store, before, after, answer):
    assert judged(store, plain=0.8, before=before, after=after).answer == answer


@pytest.mark.parametrize(
    ("after", "said"), [(0.95, "After is"), (0.85, "Before is"), (0.9, "Neither place is")]
)
def test_it_is_told_which_place_is_better(store, after, said):
    judgement = judged(store, plain=0.8, before=0.9, after=after)
    (found,) = judgement.findings
    assert found.sentence.count(f"{said} better") == 1
    assert (found.without, found.with_) == ("80.1%", f"90.1, {100 * after + 0.1:.1f}")
    assert found.effect == "+10 (+10 to +10)"
    assert found.rows[-1].values == pytest.approx([100 * (after - 0.9)] * 3, abs=1e-6)
    for chart in judgement.charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


def test_nothing_learned_is_not_measured(store):
    assert judged(store, plain=0.1, before=0.11, after=0.12).answer == "not measured"


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    data = small_data()
    plan = small_plan(data, seeds=range(3), steps=30, rates=(0.1, 0.3))
    assert studied(CLAIM, "conv", plan, data, store).answer == "holds"
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        assert studied(CLAIM, "conv", plan, data, fresh).answer == "does not hold"
