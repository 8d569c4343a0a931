"""Claim 2: made-up times give the ratios that they must, and the verdict turns with them."""

import pytest
from study.small import plan_of

from batchnorm.study.claims import judge
from batchnorm.study.claims.epoch_time import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.pictures import png
from batchnorm.study.timing import Times

PLAIN = [0.010, 0.011, 0.0115, 0.012, 0.013] * 3 + [0.5]  # something else held the last one up


def times(**factors):
    return {norm: [factor * second for second in PLAIN] for norm, factor in factors.items()}


@pytest.mark.parametrize(
    ("theirs", "ours", "answer"),
    [(1.5, 1.2, "holds"), (1.5, 0.9, "depends"), (0.9, 0.8, "does not hold")],
)
def test_the_verdict_is_of_the_ratios_in_training(store, theirs, ours, answer):
    plan = plan_of(1.0)
    (timing,) = CLAIM.tasks(plan, "conv")
    training = times(plain=1, torch=theirs, batchnorm=ours)
    inference = times(plain=0.5, torch=0.8, batchnorm=0.7, folded=0.5)
    store.add(timing, Times(training=training, inference=inference))
    judgement = judge(CLAIM, ["conv"], plan, store)
    assert judgement.answer == answer
    (found,) = judgement.findings
    assert found.effect == f"{theirs:.2f}×, {ours:.2f}×"
    assert found.without == "11.5"
    folded = found.rows[-1]
    assert (folded.condition, folded.effect.value) == ("folded", pytest.approx(1.0))
    (chart,) = judgement.charts
    assert [panel.title for panel in chart.panels] == ["conv, training", "conv, inference"]
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert chart.panels[0].y.end < 100  # the slow one flattens nothing
    assert png(chart)


def test_what_does_not_agree_has_no_time(store):
    plan = plan_of(1.0)
    (timing,) = CLAIM.tasks(plan, "conv")
    store.add(timing, Times(reason="ArithmeticError: the losses differ"))
    judgement = judge(CLAIM, ["conv"], plan, store)
    assert judgement.answer == "not measured"
    assert "the losses differ" in judgement.findings[0].sentence
    assert judgement.charts == []
