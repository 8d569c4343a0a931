"""The budget: the first part of every claim before the second of any, and what is left out."""

import math

import pytest
from study.small import small_data, small_plan

from batchnorm.study.budget import Chosen, Pace, Seconds, choose, parts_of, seconds
from batchnorm.study.claims import Claim
from batchnorm.study.networks import NETWORKS, Network, conv
from batchnorm.study.plan import plan
from batchnorm.study.recipes import NORMALIZED, PLAIN
from batchnorm.study.tasks import StudyError
from batchnorm.study.timing import Timing

DATA = small_data()
PLAN = small_plan(DATA, steps=100)
PACES = dict.fromkeys(NETWORKS, 0.01)


def claim(name, parts, tasks, any_network=False):
    return Claim(1, name, "", "", "", "", "", "", parts, tasks, None, None, any_network)


def of_runs(plan, part):
    return plan.runs(part, NORMALIZED)


COST = sum(run.seconds(PACES) for run in of_runs(PLAN, "conv"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("3m", 180), ("1.5h", 5400), ("full", math.inf), ("0s", 0)],
)
def test_a_budget_is_a_time(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "3", "m", "3 m", "-3m", "3d", "FULL", "nan"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(StudyError, match=r"--budget .*expected a time as 90s, 3m or 1h, or full"):
        seconds(text)


def chosen(claims, budget, jobs=1, plan=PLAN):
    return {
        each.claim.name: (list(each.parts), list(each.left_out))
        for each in choose(claims, plan, PACES, budget, jobs)
    }


def test_the_first_part_of_every_claim_comes_first():
    def other(plan, part):
        return plan.runs(part, PLAIN)

    claims = [claim("a", ("conv", "relu"), of_runs), claim("b", ("conv", "tanh"), other)]
    assert chosen(claims, math.inf) == {"a": (["conv", "relu"], []), "b": (["conv", "tanh"], [])}
    assert chosen(claims, 25 + 1.9 * COST) == {"a": (["conv"], ["relu"]), "b": (["conv"], ["tanh"])}
    assert chosen(claims, 25 + 1.1 * COST) == {
        "a": (["conv"], ["relu"]),
        "b": ([], ["conv", "tanh"]),
    }
    assert chosen(claims, 0) == {"a": ([], ["conv", "relu"]), "b": ([], ["conv", "tanh"])}


def test_what_is_shared_costs_once_and_jobs_share_the_work():
    claims = [claim("a", ("conv",), of_runs), claim("b", ("conv",), of_runs)]
    assert chosen(claims, 25 + 1.01 * COST)["b"] == (["conv"], [])
    assert chosen(claims, 25 + 0.51 * COST)["a"] == ([], ["conv"])
    assert chosen(claims, 25 + 0.51 * COST, jobs=2)["a"] == (["conv"], [])


def test_what_is_done_already_costs_nothing():
    claims = [claim("a", ("conv",), of_runs), claim("b", ("relu",), of_runs)]
    (first, second) = choose(claims, PLAN, PACES, 26, 1, set(of_runs(PLAN, "conv")))
    assert (first.parts, second.parts) == (["conv"], [])


def test_what_must_be_alone_is_not_shared():
    def times(plan, part):
        return [Timing(plan.data, plan.networks[part], plan.repeats)]

    (cost,) = (task.seconds(PACES) for task in times(PLAN, "conv"))
    assert chosen([claim("a", ("conv",), times)], 25 + 0.9 * cost, jobs=8)["a"] == ([], ["conv"])


def test_a_smaller_part_is_tried_after_one_that_does_not_fit():
    def tasks(plan, part):
        return plan.runs(part, NORMALIZED, steps=1000 if part == "conv" else 1)

    assert chosen([claim("a", ("conv", "relu"), tasks)], 30)["a"] == (["relu"], ["conv"])


def test_networks_that_a_user_brings_are_parts_of_claims_about_any():
    brought = plan(DATA, [Network("mine", conv)])
    assert parts_of(claim("a", ("conv",), of_runs, any_network=True), brought) == ["conv", "mine"]
    assert parts_of(claim("a", ("conv",), of_runs), brought) == ["conv"]


def test_the_tasks_of_what_is_chosen():
    made = Chosen(claim("a", ("conv", "relu"), of_runs), ["relu"], ["conv"])
    assert made.tasks(PLAN) == of_runs(PLAN, "relu")


def test_a_pace_is_taken_once():
    pace = Pace(PLAN.data, NETWORKS["conv"])
    assert 0 < pace.perform(DATA).step < 10
    assert pace.outcome is Seconds
    assert pace.key != Pace(PLAN.data, NETWORKS["relu"]).key


def test_longer_runs_are_thought_to_take_longer():
    (short, long) = (PLAN.run("conv", NORMALIZED, steps=steps) for steps in (100, 1000))
    assert 5 < long.seconds(PACES) / short.seconds(PACES) < 15
    assert PLAN.run("conv", PLAIN).seconds(PACES) < PLAN.run("conv", NORMALIZED).seconds(PACES)
    probed = PLAN.run("conv", NORMALIZED, probes=(len,))
    assert probed.seconds(PACES) > PLAN.run("conv", NORMALIZED).seconds(PACES)
