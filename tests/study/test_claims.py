"""The claims: made-up outcomes give the numbers that they must, and the verdict turns with them."""

import numpy as np
import pytest
from study.small import plan_of, result, rising, small_data, small_plan

from batchnorm.study.claims import (
    CLAIMS,
    Finding,
    Judgement,
    agreement,
    epoch_time,
    fewer_steps,
    judge,
    learning_rates,
)
from batchnorm.study.claims.measures import best_rate, curve, final
from batchnorm.study.interval import ratio
from batchnorm.study.store import Store
from batchnorm.study.timing import Times
from batchnorm.study.training import Result


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as made:
        yield made


def fill(store, plan, outcome):
    """Give every run of a plan's grid the outcome that a function makes of it."""
    for run in plan.grid():
        store.add(run, outcome(run))


def findings(claim, plan, store):
    found = claim.measure(plan, store)
    return found, Judgement(claim, found, []).answer


class TestInterval:
    def test_equal_ratios_have_no_spread(self):
        interval = ratio([30, 60, 3], [10, 20, 1])
        assert [interval.value, interval.low, interval.high] == pytest.approx([3, 3, 3])
        assert str(interval) == "3× (3–3)"

    def test_the_mean_is_geometric(self):
        assert ratio([1, 100], [1, 1]).value == pytest.approx(10)
        assert ratio([1, 100, 1], [1, 1, 1], robust=True).value == pytest.approx(1)

    def test_the_interval_covers_as_often_as_it_says(self):
        random = np.random.default_rng(1)
        draws = np.exp(random.normal(0.5, 1.0, (200, 30)))
        intervals = [ratio(draw, np.ones(30)) for draw in draws]
        covered = np.mean([each.low <= np.exp(0.5) <= each.high for each in intervals])
        assert 0.89 <= covered <= 0.99


@pytest.mark.parametrize(
    ("holds", "answer"),
    [
        ([[True], [True]], "holds"),
        ([[False], [False, False]], "does not hold"),
        ([[True], [False]], "depends"),
        ([[True, False]], "depends"),
        ([[True], []], "holds"),
        ([[]], "not measured"),
        ([], "not measured"),
    ],
)
def test_the_answer(holds, answer):
    made = [Finding("conv", "", "", holds=each) for each in holds]
    assert Judgement(CLAIMS[0], made, []).answer == answer


class TestFewerSteps:
    def made_up(self, plain, normalized):
        """Accuracies that rise at a step which depends on the norm, later from seed to seed."""

        def outcome(run):
            step = plain if run.norm == "plain" else normalized
            high = 0.9 if run.learning_rate == 1.0 else 0.8
            return result(rising(step + run.seed, high=high))

        return outcome

    def test_the_steps_until(self):
        made = result([0.1, 0.5, 0.4, 0.6])
        assert [fewer_steps.steps_until(made, goal) for goal in (0.1, 0.5, 0.6)] == [1, 2, 4]
        assert fewer_steps.steps_until(made, 0.7) == float("inf")
        assert fewer_steps.steps_until(Result(), 0.0) == float("inf")

    def test_fewer_steps_hold(self, store):
        plan = plan_of(0.5, 1.0)
        fill(store, plan, self.made_up(80, 10))
        assert best_rate(plan, store, "conv", "plain") == 1.0
        (found,), answer = findings(fewer_steps.CLAIM, plan, store)
        assert answer == "holds"
        assert found.cells == {"plain": "81", "torch": "11", "batchnorm": "11"}
        expected = (80 * 81 * 82 / (10 * 11 * 12)) ** (1 / 3)
        assert found.effect.startswith(f"{expected:.3g}×")
        assert found.details[2][3] == "10, 11, 12"

    @pytest.mark.parametrize("normalized", [50, 80])
    def test_as_many_or_more_steps_do_not(self, store, normalized):
        plan = plan_of(1.0)
        fill(store, plan, self.made_up(50, normalized))
        assert findings(fewer_steps.CLAIM, plan, store)[1] == "does not hold"

    def test_a_run_that_never_gets_there_counts_with_all_its_steps(self, store):
        plan = plan_of(1.0)
        fill(store, plan, lambda run: result(rising(50, high=0.9 if run.norm == "plain" else 0.8)))
        (found,), answer = findings(fewer_steps.CLAIM, plan, store)
        assert (found.cells["plain"], found.cells["batchnorm"], answer) == (
            *("50", "100"),
            "does not hold",
        )

    def test_nothing_learned_is_not_measured(self, store):
        plan = plan_of(1.0)  # as with shuffled labels
        fill(store, plan, lambda run: result([0.1, 0.12, 0.11]))
        assert findings(fewer_steps.CLAIM, plan, store)[1] == "not measured"


class TestLearningRates:
    RATES = (0.1, 1.0, 10.0, 100.0)

    def made_up(self, plain, normalized):
        """Runs that train up to a rate which depends on the norm, and break off beyond it."""

        def outcome(run):
            limit = plain if run.norm == "plain" else normalized
            if run.learning_rate <= limit:
                return result([0.1, 0.9, 0.9, 0.9])
            return result([0.9], "the loss was nan at step 2")

        return outcome

    def test_the_end_of_a_run(self):
        assert final(result([0.9, 0.1, 0.2, 0.3])) == pytest.approx(0.2)
        assert final(result([0.9], "broke off")) == 0

    def test_a_higher_limit_holds(self, store):
        plan = plan_of(*self.RATES)
        fill(store, plan, self.made_up(1.0, 10.0))
        (found,), answer = findings(learning_rates.CLAIM, plan, store)
        assert (found.effect, answer) == ("10× (10–10)", "holds")
        assert found.cells == {"plain": "1", "torch": "10", "batchnorm": "10"}

    def test_a_limit_beyond_the_grid_is_said(self, store):
        plan = plan_of(*self.RATES)
        fill(store, plan, self.made_up(1.0, 1000.0))
        (found,), _ = findings(learning_rates.CLAIM, plan, store)
        assert found.cells["batchnorm"] == "≥ 100"

    @pytest.mark.parametrize("normalized", [0.1, 1.0])
    def test_the_same_or_a_lower_limit_does_not(self, store, normalized):
        plan = plan_of(*self.RATES)
        fill(store, plan, self.made_up(1.0, normalized))
        assert findings(learning_rates.CLAIM, plan, store)[1] == "does not hold"

    @pytest.mark.parametrize("normalized", [0.0, 10.0])
    def test_without_a_plain_run_that_trains_it_is_not_measured(self, store, normalized):
        plan = plan_of(*self.RATES)
        fill(store, plan, self.made_up(0.0, normalized))
        assert findings(learning_rates.CLAIM, plan, store)[1] == "not measured"


class TestEpochTime:
    @pytest.mark.parametrize(
        ("theirs", "ours", "answer"),
        [(1.5, 1.2, "holds"), (1.5, 0.9, "depends"), (0.9, 0.8, "does not hold")],
    )
    def test_the_verdict_is_of_the_ratios(self, store, theirs, ours, answer):
        plan = plan_of(1.0)
        (timing,) = epoch_time.tasks(plan)
        plain = [0.010, 0.011, 0.012, 0.5]  # something else held the last one up
        times = {"plain": plain, "torch": [theirs * t for t in plain]}
        store.add(timing, Times(seconds={**times, "batchnorm": [ours * t for t in plain]}))
        (found,), given = findings(epoch_time.CLAIM, plan, store)
        assert given == answer
        assert found.effect == f"{theirs:.2f}×, {ours:.2f}×"
        assert found.cells["plain"] == "11.5"

    def test_what_does_not_agree_has_no_time(self, store):
        plan = plan_of(1.0)
        (timing,) = epoch_time.tasks(plan)
        store.add(timing, Times(reason="ArithmeticError: the losses differ"))
        (found,), answer = findings(epoch_time.CLAIM, plan, store)
        assert answer == "not measured"
        assert "the losses differ" in found.sentence
        assert epoch_time.charts(plan, store) == []


class TestAgreement:
    @pytest.mark.parametrize(("difference", "answer"), [(1e-12, "holds"), (1e-8, "does not hold")])
    def test_the_verdict_is_of_the_largest_difference_in_float64(self, store, difference, answer):
        plan = plan_of(1.0, steps=3)
        for run in agreement.tasks(plan):
            off = difference if (run.dtype, run.norm) == ("float64", "batchnorm") else 0.0
            store.add(run, Result(losses=[2.0, 1.0 + off, 0.5]))
        (found,), given = findings(agreement.CLAIM, plan, store)
        assert given == answer
        assert found.effect == f"within {difference:.0e}"
        assert found.cells == {"torch": "0.500000", "batchnorm": "0.500000"}
        (chart,) = agreement.charts(plan, store)
        single, double = chart.panels[0].series
        assert single.y == [1e-17] * 3
        assert double.y == pytest.approx([1e-17, difference, difference], rel=1e-3)

    def test_a_run_that_broke_off_is_not_compared(self, store):
        plan = plan_of(1.0, steps=3)
        for run in agreement.tasks(plan):
            store.add(run, result([], "the loss was nan at step 1"))
        (found,), answer = findings(agreement.CLAIM, plan, store)
        assert answer == "not measured"
        assert "the loss was nan at step 1" in found.sentence


def test_a_curve_is_the_median_in_a_band():
    line = curve("plain", [1, 2, 3], [[1, 2, 3], [5, 6, 7], [2, 9]])
    assert (line.x, line.low, line.y, line.high) == ([1, 2], [1, 2], [2, 6], [5, 9])
    assert curve("plain", [1], [[1.0], []]).y == []


def test_claims_share_their_runs():
    plan = small_plan(small_data())
    tasks = [task for claim in CLAIMS for task in claim.tasks(plan)]
    grid = 2 * 2 * 2 * 3  # networks, rates, seeds, norms
    assert len(set(tasks)) == grid + 2 * 2 + 2  # and pairs in float64, and times
    assert len({task.key for task in tasks}) == len(set(tasks))
    assert len(tasks) > len(set(tasks))


def test_a_study_in_which_everything_broke_off_is_judged_too(store):
    plan = small_plan(small_data())
    for task in {task for claim in CLAIMS for task in claim.tasks(plan)}:
        store.add(task, task.outcome(reason="RuntimeError: no luck"))
    judgements = judge(plan, store)
    assert {judgement.answer for judgement in judgements} == {"not measured"}
    assert [judgement.claim.number for judgement in judgements] == [1, 2, 3, 0]
