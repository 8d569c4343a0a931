"""Claim 12: a quadratic loss is measured as such, and the verdict turns with what was seen."""

import copy
import math

import numpy as np
import pytest
import torch
from study.small import plan_of, small_data, small_plan, studied, without_normalization
from torch.nn.functional import cross_entropy

from batchnorm.study.claims import judge
from batchnorm.study.claims.landscape import CLAIM
from batchnorm.study.descent import step
from batchnorm.study.interactive import figure
from batchnorm.study.measures import landscape as along
from batchnorm.study.measures.landscape import (
    LENGTHS,
    along_the_gradient,
    changes,
    shares,
    smoothness,
    variations,
)
from batchnorm.study.networks import NETWORKS, build, maps
from batchnorm.study.observation import Result, State
from batchnorm.study.pictures import png
from batchnorm.study.recipes import NORMALIZED, PLAIN

DATA = small_data()


def state_of(model, rate):
    """What a probe sees of a network before a step."""
    batch = torch.from_numpy(DATA.train_inputs[:60]), torch.from_numpy(DATA.train_labels[:60])
    return State(model, 0, False, rate, batch, batch, batch, DATA)


class TestTheProbe:
    @pytest.mark.parametrize("recipe", [PLAIN, NORMALIZED])
    def test_one_length_is_a_step_of_training(self, recipe):
        model = build(NETWORKS["conv"], recipe, DATA.shape, 10, seed=0)
        before = copy.deepcopy(model.state_dict())
        state = state_of(model, 0.3)
        seen = along_the_gradient(state)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        x, y = state.batch
        assert seen["losses"][0] == pytest.approx(step(model, x, y, 0.3), rel=1e-5)
        there = seen["losses"][1 + LENGTHS.index(1.0)]
        assert there == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-5)

    def test_the_curvature_of_a_quadratic_loss_is_its_smoothness(self, monkeypatch):
        curvature = 3.0  # the loss is half of it times the square of the only parameter
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 2.0)
        monkeypatch.setattr(along, "cross_entropy", lambda w, _: curvature / 2 * (w**2).sum())
        one = torch.ones(1, 1), torch.zeros(1)
        seen = along_the_gradient(State(model, 0, False, 0.1, one, one, one, DATA))
        # A length l multiplies the parameter by 1 - 0.1 l * curvature, and so the gradient.
        factors = [1.0] + [1 - 0.1 * length * curvature for length in LENGTHS]
        assert seen["losses"] == pytest.approx([6 * factor**2 for factor in factors])
        assert seen["changes"] == pytest.approx([1 - factor for factor in factors[1:]])
        made = Result(observed={"along_the_gradient": [[0, seen]]})
        assert smoothness(made) == pytest.approx([curvature])
        assert variations(made) == pytest.approx([6 * (1 - 0.2**2)])
        assert shares(made) == pytest.approx([1 - 0.2**2])
        mean = math.exp(np.mean(np.log([0.3 * length for length in LENGTHS])))
        assert changes(made) == pytest.approx([mean])

    def test_what_broke_is_finite(self):
        model = build(NETWORKS["relu"], PLAIN, DATA.shape, 10, seed=0)
        with torch.no_grad():
            maps(model)[0].weight.fill_(math.inf)
        seen = along_the_gradient(state_of(model, 0.1))
        assert np.isfinite([*seen["losses"], *seen["changes"]]).all()


def judged(store, losses=0.5, gradients=0.4, reason="", learns=True):
    """A judgement, with normalization, of these ratios to the plain network."""
    plan = plan_of(1.0)
    for run in CLAIM.tasks(plan, "conv"):
        ours = run.recipe.normalized
        far = 1 + 0.1 * run.seed
        fall = 2 * (losses if ours else 1.0) * far
        change = (gradients if ours else 1.0) * far
        seen = {
            "losses": [3.0, *(3.0 - fall * length / 4 for length in LENGTHS)],
            "changes": [change * length for length in LENGTHS],
            "rate": 0.5,
        }
        flat = {**seen, "losses": [3.0, *(3.0 - 0.01 * fall * length / 4 for length in LENGTHS)]}
        observed = {"along_the_gradient": [[0, flat], [5, seen], [9, seen]]}
        losses_of = [1.0] * 5 + [0.8 if learns else 1.0] * 4
        store.add(run, Result(losses=losses_of, observed=observed, reason=reason))
    return judge(CLAIM, ["conv"], plan, store)


def test_less_change_holds(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_, found.effect) == ("1.1", "0.439", "0.4× (0.4–0.4)")
    values = {(row.condition, row.measure): row for row in found.rows}
    assert values["plain, learning", "effective smoothness"].values == pytest.approx([2, 2.2, 2.4])
    assert str(values["batchnorm, learning", "effective smoothness"].effect) == "0.4× (0.4–0.4)"
    assert values["batchnorm, learning", "range of the loss"].values == pytest.approx([1, 1.1, 1.2])
    plateau = values["batchnorm, before it learns", "range of the loss"]
    assert plateau.values == pytest.approx([0.01, 0.011, 0.012])
    losses, gradients = judgement.charts
    plain, ours = losses.panels[0].series
    assert (plain.low[1], plain.y[1], plain.high[1]) == pytest.approx((1, 3, 3))
    assert ours.low[1] == pytest.approx(2)
    assert len(gradients.panels) == 2
    assert gradients.panels[1].series[0].x == LENGTHS
    for chart in judgement.charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [((0.5, 1.45), [True, False]), ((1.1, 0.5), [False, True]), ((1.0, 1.0), [False, False])],
)
def test_each_check_turns(store, ratios, expected):
    assert list(judged(store, *ratios).findings[0].checks.values()) == expected


def test_runs_that_broke_off_are_not_measured(store):
    judgement = judged(store, reason="the loss was nan at step 3")
    assert judgement.answer == "not measured"
    assert "the loss was nan at step 3" in judgement.findings[0].sentence
    assert judgement.charts == []


def test_a_network_that_never_begins_to_learn_is_not_measured(store):
    judgement = judged(store, learns=False)
    assert judgement.answer == "not measured"
    assert "did not begin to learn in 9 steps" in judgement.findings[0].sentence


@pytest.mark.parametrize("normalized", [True, False])
def test_it_is_normalization_that_does_it(store, monkeypatch, normalized):
    if not normalized:
        without_normalization(monkeypatch)
    plan = small_plan(DATA, steps=60)
    (found,) = studied(CLAIM, "relu", plan, DATA, store).findings
    assert list(found.checks.values()) == [normalized, normalized]
