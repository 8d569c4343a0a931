"""The claims as a whole: found, complete, sharing their runs, and judged by their checks alone."""

import ast
from pathlib import Path

import numpy as np
import pytest
from study.small import plan_of, result, small_data, small_plan

from batchnorm.study import claims
from batchnorm.study.budget import parts_of
from batchnorm.study.charts import STYLES
from batchnorm.study.claims import Claim, Finding, Judgement, Row, all_claims, judge
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import beside, curve, reaching
from batchnorm.study.measures.runs import NotMeasured, each, final, learned, whole
from batchnorm.study.networks import NETWORKS
from batchnorm.study.recipes import PLAIN

CLAIMS = all_claims()
BY_NAME = [pytest.param(claim, id=claim.name) for claim in CLAIMS]


@pytest.mark.parametrize(
    ("held", "answer"),
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
def test_the_answer(held, answer):
    made = [Finding("conv", "", checks=dict(enumerate(each))) for each in held]
    assert Judgement(CLAIMS[0], made, []).answer == answer


def test_all_claims_of_the_notes_are_there():
    assert [claim.number for claim in CLAIMS if claim.number] == list(range(1, 21))
    assert [claim.key for claim in CLAIMS if not claim.number] == ["agreement"]
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("claim", BY_NAME)
def test_a_claim_is_whole(claim):
    for text in (claim.title, claim.says, claim.source, claim.measured, claim.rule, claim.unit):
        assert text.strip() == text != ""
        assert "  " not in text
    assert len(claim.title) <= 48
    assert claim.measured.endswith(".")
    assert claim.rule.endswith(".")
    assert claim.name.isidentifier()
    plan = small_plan(small_data())
    for part in parts_of(claim, plan):
        tasks = claim.tasks(plan, part)
        assert tasks
        for task in tasks:
            assert str(task)
            assert task.seconds(dict.fromkeys(NETWORKS, 1e-3)) > 0


def test_claims_share_their_runs_and_no_two_tasks_have_one_name():
    plan = small_plan(small_data())
    tasks = [task for claim in CLAIMS for part in claim.parts for task in claim.tasks(plan, part)]
    assert len({task.key for task in tasks}) == len(set(tasks))
    assert len({str(task) for task in tasks}) == len(set(tasks))
    assert len(set(tasks)) < 0.75 * len(tasks)


def test_probes_have_names_of_their_own():
    plan = small_plan(small_data())
    probes = {
        probe
        for claim in CLAIMS
        for part in claim.parts
        for task in claim.tasks(plan, part)
        for probe in getattr(task, "probes", ())
    }
    assert len({probe.__name__ for probe in probes}) == len(probes)


def test_no_two_charts_are_kept_in_one_file():
    calls = [
        node
        for file in Path(claims.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Chart"
    ]
    names = [ast.literal_eval(call.args[0]) for call in calls]
    assert len(names) > len(CLAIMS)
    assert len(set(names)) == len(names)


def test_seeds_without_a_difference_seldom_show_one():
    random = np.random.default_rng(0)
    studies = [difference(*random.normal(size=(2, 5))) for _ in range(500)]
    for wrong in ([of.low > 0 for of in studies], [of.high < 0 for of in studies]):
        assert 0 < np.mean(wrong) < 0.06


@pytest.mark.parametrize("claim", BY_NAME)
def test_a_study_in_which_everything_broke_off_is_judged_too(claim, store):
    plan = small_plan(small_data())
    for part in claim.parts:
        for task in claim.tasks(plan, part):
            store.add(task, task.broken("RuntimeError: no luck"))
    judgement = judge(claim, claim.parts, plan, store)
    assert judgement.answer == "not measured"
    assert list(judgement.charts) == []
    assert [finding.part for finding in judgement.findings] == list(claim.parts)
    for finding in judgement.findings:
        assert finding.sentence.endswith(".")
        assert "failed" not in finding.sentence  # it was foreseen


def made(measure, charts=lambda *_: []):
    return Claim(1, "made", "", "", "", "", "", "", ("a", "b"), lambda *_: [], measure, charts)


def test_a_part_that_cannot_be_measured_says_why_and_stops_no_other(store):
    def measure(plan, part, store):
        if part == "a":
            raise NotMeasured("Nothing was learned.")
        return Finding(part, "It is.", checks={"is": True}, rows=[Row("c", "m", [1.0])])

    drawn = []
    judgement = judge(
        made(measure, lambda _, parts, __: drawn.extend(parts) or []), "ab", None, store
    )
    assert [finding.sentence for finding in judgement.findings] == [
        "Nothing was learned.",
        "It is.",
    ]
    assert judgement.answer == "holds"
    assert drawn == ["b"]


def test_what_fails_in_a_claim_is_a_finding(store):
    judgement = judge(made(lambda *_: {}["no"]), ["a"], None, store)
    assert judgement.findings[0].sentence == "Measuring failed: KeyError: 'no'."
    assert judgement.answer == "not measured"


def test_pictures_that_fail_are_left_away(store):
    def measure(plan, part, store):
        return Finding(part, "It is.", checks={"is": True}, rows=[Row("c", "m", [1.0])])

    with pytest.warns(UserWarning, match="pictures of '' failed: KeyError"):
        judgement = judge(made(measure, lambda *_: {}["no"]), ["a"], None, store)
    assert judgement.answer == "holds"
    assert judgement.charts == []


class TestMeasures:
    def test_the_end_of_a_run(self):
        assert final(result([0.9, 0.1, 0.2, 0.3])) == pytest.approx(0.2)
        assert final(result([0.9], "broke off")) == 0

    def test_learned_is_more_than_noise(self):
        plan = plan_of(1.0)
        assert not learned(0.18, plan)
        assert learned(0.2, plan)

    def test_runs_that_broke_off_are_not_measured(self, store):
        runs = plan_of(1.0).runs("conv", PLAIN)
        for run in runs:
            store.add(run, result([0.5], "lost" if run.seed == 1 else ""))
        with pytest.raises(NotMeasured, match=r"broke off .*seed 1.*: lost"):
            whole(store, runs)
        assert each(store, runs[:1], final) == [0.5]
        with pytest.raises(NotMeasured, match="not finite"):
            each(store, runs[:1], lambda _: float("nan"))

    def test_a_curve_is_the_median_in_a_band(self):
        line = curve("plain", [1, 2, 3], [[1, 2, 3], [5, 6, 7], [2, 9]])
        assert (line.x, line.low, line.y, line.high) == ([1, 2], [1, 2], [2, 6], [5, 9])
        assert curve("plain", [1], [[1.0], []]).y == []

    def test_values_side_by_side(self):
        panel = beside("t", "l", {"torch": [1.0, 3.0, 2.0], "mine": [10.0]}, goal=(12.0, "g"))
        assert [series.mark for series in panel.series] == ["dots", "bar", "dots", "bar"]
        assert [series.style for series in panel.series] == ["torch", "torch", "other", "other"]
        assert panel.x.ticks == [(0, STYLES["torch"].name), (1, "mine")]
        assert panel.series[1].y == [2.0]
        assert panel.y.start < 1 < 12 < panel.y.end

    @pytest.mark.parametrize("values", [[[1.0, 100.0]], [[5.0]], [[]], [[-1.0, 0.0], [np.inf]]])
    @pytest.mark.parametrize("log", [False, True])
    def test_an_axis_has_room_for_all(self, values, log):
        axis = reaching("l", values, log)
        finite = [v for some in values for v in some if np.isfinite(v) and (v > 0 or not log)]
        assert axis.start < axis.end
        assert all(axis.start < value < axis.end for value in finite)
        assert not log or axis.start > 0
