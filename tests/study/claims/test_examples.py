"""Claim 20: the worked examples, and a verdict that turns with what computes them."""

import numpy as np
import pytest
from study.small import small_data, small_plan, studied

from batchnorm.study.claims import judge
from batchnorm.study.claims.examples import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.measures import examples as worked
from batchnorm.study.measures import implementations
from batchnorm.study.measures.examples import EPS, Worked, WorkedExamples
from batchnorm.study.pictures import png

DATA = small_data()
PLAN = small_plan(DATA)
NAMES = ("reference", "torch.nn", "batchnorm")


def test_the_examples_are_those_of_the_notes(store):
    judgement = studied(CLAIM, "layer", PLAN, DATA, store)
    assert judgement.answer == "holds"
    outcome = store[WorkedExamples(PLAN.data)]
    assert (outcome.mean, outcome.variance) == (10, 46)
    for name in NAMES:
        assert np.round(outcome.normalized[name], 2).tolist() == [
            *(-1.03, -0.74, -0.29, -0.15),
            *(0.15, 2.06),
        ]
        # To first order, 3 * sqrt(2) / 4 of eps, and a ten thousandth of it for 100 times as much.
        assert [small for small, _ in outcome.distances[name]] == pytest.approx(
            [1.06 * eps for eps in EPS], rel=0.01
        )
        assert outcome.distances[name][1][1] == pytest.approx(1.06e-4 * EPS[1], rel=0.01)


def test_the_chart_is_drawn(store):
    (chart,) = studied(CLAIM, "layer", PLAN, DATA, store).charts
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


def made_up(store, mean=10.0, last=2.0642, distance=1e-12):
    """A judgement of made-up examples."""
    normalized = [-1.0321, -0.7372, -0.2949, -0.1474, 0.1474, last]
    outcome = Worked(
        mean=mean,
        variance=46.0,
        normalized=dict.fromkeys(NAMES, normalized),
        distances={name: [[eps, distance] for eps in EPS] for name in NAMES},
    )
    store.add(WorkedExamples(PLAN.data), outcome)
    return judge(CLAIM, ["layer"], PLAN, store).findings[0].checks


@pytest.mark.parametrize(
    ("wrong", "checks"),
    [
        ({}, [True, True, True]),
        ({"mean": 10.1}, [False, True, True]),
        ({"last": 2.07}, [True, False, True]),
        ({"distance": 1e-3}, [True, True, False]),
    ],
)
def test_each_check_can_fail(store, wrong, checks):
    assert list(made_up(store, **wrong).values()) == checks


def test_it_turns_where_a_layer_normalizes_otherwise(store, monkeypatch):
    right = implementations.NORMALIZE["batchnorm"]

    def twice(x, gamma, beta, eps=1e-5):
        return 2 * right(x, gamma, beta, eps)

    monkeypatch.setattr(worked, "NORMALIZE", {**implementations.NORMALIZE, "batchnorm": twice})
    checks = studied(CLAIM, "layer", PLAN, DATA, store).findings[0].checks
    assert list(checks.values()) == [True, False, False]


def test_what_broke_off_is_not_measured(store):
    store.add(WorkedExamples(PLAN.data), Worked(reason="no memory"))
    judgement = judge(CLAIM, ["layer"], PLAN, store)
    assert judgement.answer == "not measured"
    assert "no memory" in judgement.findings[0].sentence
