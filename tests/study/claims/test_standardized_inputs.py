"""Claim 11: the loss surface of a linear model, and the steps of gradient descent on it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from study.small import small_data, small_plan, studied

from batchnorm.study.claims import judge
from batchnorm.study.claims.standardized_inputs import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.measures import standardized_inputs as least_squares
from batchnorm.study.measures.standardized_inputs import Surface, Surfaces
from batchnorm.study.pictures import png

DATA = small_data()
PLAN = small_plan(DATA, seeds=(0, 1, 2))


def test_the_steps_are_those_of_gradient_descent():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 3)) * [1, 3, 0.5] + [0, 2, 0]
    y = np.eye(2)[draw.integers(0, 2, 40)]
    surface = least_squares._surface(torch.from_numpy(x), torch.from_numpy(y))

    biased = np.c_[x, np.ones(40)]
    least = np.square(biased @ np.linalg.lstsq(biased, y, rcond=None)[0] - y).sum()
    rate = 1 / np.linalg.eigvalsh(biased.T @ biased / 40)[-1]
    weights, taken = np.zeros((4, 2)), 0
    start = np.square(y).sum() - least
    while np.square(biased @ weights - y).sum() - least > 0.01 * start:
        weights -= rate * biased.T @ (biased @ weights - y) / 40
        taken += 1
    assert surface.steps == taken
    assert taken > 10
    assert surface.condition == pytest.approx(np.linalg.cond(biased) ** 2)
    assert surface.curved == 4
    assert surface.spectrum[0] == 1
    assert surface.spectrum[-1] == pytest.approx(1 / surface.condition)


def test_directions_without_a_slope_are_left_out():
    draw = np.random.default_rng(0)
    one = draw.normal(size=(40, 1))
    x = torch.from_numpy(np.c_[one, 2 * one, np.full((40, 1), 7.0)])
    y = torch.from_numpy(np.eye(2)[draw.integers(0, 2, 40)])
    surface = least_squares._surface(x, y)
    assert surface.curved == 2  # the one feature, and the bias
    assert surface.condition < 100


def test_standardized_features_have_one_curvature():
    draw = np.random.default_rng(0)
    x = np.linalg.qr(np.c_[np.ones(50), draw.normal(size=(50, 3))])[0][:, 1:] * np.sqrt(50)
    surface = least_squares._surface(torch.from_numpy(x), torch.from_numpy(draw.random((50, 2))))
    assert (surface.condition, surface.steps) == (pytest.approx(1), 1)


def judged(store, condition, steps):
    """A judgement of made-up surfaces: the values of raw inputs, where 10 are standardized ones."""
    for task in CLAIM.tasks(PLAN, "badly scaled"):
        made = [
            Surface(c + task.seed, s + task.seed, 5, [1.0] * least_squares.PLACES)
            for c, s in ((condition, steps), (50, 50), (10, 10))
        ]
        store.add(task, Surfaces(raw=made[0], centred=made[1], standardized=made[2]))
    return judge(CLAIM, ["badly scaled"], PLAN, store)


@pytest.mark.parametrize(
    ("condition", "steps", "checks"),
    [(100, 100, [True, True]), (100, 10, [True, False]), (10, 10, [False, False])],
)
def test_each_check_can_fail(store, condition, steps, checks):
    (found,) = judged(store, condition, steps).findings
    assert list(found.checks.values()) == checks
    assert found.rows[0].values == [condition, condition + 1, condition + 2]


def test_it_holds_on_digits_as_they_are_and_badly_scaled(store):
    for part in CLAIM.parts:
        assert studied(CLAIM, part, PLAN, DATA, store).answer == "holds"
    charts = judge(CLAIM, CLAIM.parts, PLAN, store).charts
    assert [len(chart.panels) for chart in charts] == [2, 2]
    for chart in charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


def test_it_turns_where_the_inputs_are_standardized_already(store):
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(600, 5, 1, 1)).astype(np.float32)
    labels = (inputs[:, 0, 0, 0] > 0).astype(np.int64)
    data = replace(
        DATA,
        train_inputs=inputs,
        train_labels=labels,
        test_inputs=inputs[:50],
        test_labels=labels[:50],
        classes=2,
    )
    plan = small_plan(data, seeds=range(5))
    found = studied(CLAIM, "as they are", plan, data, store).findings[0]
    assert found.checks["fewer steps"] is False
    assert max(found.rows[3].values) < 60


def test_what_broke_off_is_not_measured(store):
    for task in CLAIM.tasks(PLAN, "as they are"):
        store.add(task, Surfaces(reason="no memory"))
    assert judge(CLAIM, ["as they are"], PLAN, store).answer == "not measured"
