"""The check of the numbers: made-up losses give the difference that they must."""

import pytest
from study.small import plan_of

from batchnorm.study.claims import judge
from batchnorm.study.claims.agreement import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.observation import Result
from batchnorm.study.pictures import png


@pytest.mark.parametrize(("difference", "answer"), [(1e-12, "holds"), (1e-8, "does not hold")])
def test_the_verdict_is_of_the_largest_difference_in_float64(store, difference, answer):
    plan = plan_of(1.0, steps=3)
    for run in CLAIM.tasks(plan, "conv"):
        off = difference if (run.dtype, run.recipe.norm) == ("float64", "batchnorm") else 0.0
        store.add(run, Result(losses=[2.0, 1.0 + off, 0.5]))
    judgement = judge(CLAIM, ["conv"], plan, store)
    assert judgement.answer == answer
    (found,) = judgement.findings
    assert found.effect == f"within {difference:.0e}"
    assert (found.without, found.with_) == ("0.500000", "0.500000")
    (chart,) = judgement.charts
    single, double = chart.panels[0].series
    assert single.y == [1e-17] * 3
    assert double.y == pytest.approx([1e-17, difference, difference], rel=1e-3)
    assert figure(chart.panels[0])["data"]
    assert png(chart)


def test_a_run_that_broke_off_is_not_compared(store):
    plan = plan_of(1.0, steps=3)
    for run in CLAIM.tasks(plan, "conv"):
        store.add(run, Result(reason="the loss was nan at step 1"))
    judgement = judge(CLAIM, ["conv"], plan, store)
    assert judgement.answer == "not measured"
    assert "the loss was nan at step 1" in judgement.findings[0].sentence
