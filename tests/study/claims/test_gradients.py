"""Claim 5: gradients by depth, and the verdict that turns with them."""

import pytest
import torch
from study.small import small_data, small_plan, studied, without_normalization
from torch import nn

from batchnorm.study.claims import judge
from batchnorm.study.claims.gradients import CLAIM, gradient_norms, unevenness
from batchnorm.study.interactive import figure
from batchnorm.study.pictures import png
from batchnorm.study.store import Store
from batchnorm.study.training import Result, State

DATA = small_data()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as made:
        yield made


def test_the_gradients_are_those_of_the_maps_outputs():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(4 * torch.eye(2))
    x, y = torch.zeros(3, 2), torch.tensor([0, 0, 0])
    state = State(model, 0, False, 1.0, (x, y), (x, y), (x, y), DATA)
    # The loss is a mean over 3 of cross entropies whose gradient is (-1/2, 1/2) each.
    assert gradient_norms(state) == pytest.approx([4 / 6, 1 / 6])
    assert not model[0]._forward_hooks


def test_unevenness_counts_orders_of_magnitude_between_the_hidden_layers():
    assert unevenness([1e-3, 1.0, 1.0, 99.0]) == pytest.approx(3)
    assert unevenness([10.0, 1.0, 0.1, 99.0]) == pytest.approx(2)


def judged(store, plain, he, ours):
    """A judgement of gradients that fall by factors from the last hidden layer to the first."""
    plan = small_plan(DATA)
    falls = {("plain", "xavier"): plain, ("plain", "he"): he, ("batchnorm", ""): ours}
    for run in CLAIM.tasks(plan, "deep relu"):
        start, later = falls[run.recipe.norm, run.recipe.initialization]
        seen = [[0, [start, 1.0, 1.0, 1.0]], [2, [later, 1.0, 1.0, 1.0]]]
        store.add(run, Result(observed={"gradient_norms": seen}))
    return judge(CLAIM, ["deep relu"], plan, store)


def test_it_holds_where_normalization_is_evener_than_both(store):
    judgement = judged(store, (1e-5, 1e-5), (0.1, 1e-3), (0.5, 0.5))
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert found.without == "5.0"
    assert found.with_ == "0.3"
    (chart,) = judgement.charts
    assert [panel.title for panel in chart.panels] == [
        "deep relu, at the start",
        "deep relu, at the end",
    ]
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


def test_it_depends_where_an_initialization_is_enough(store):
    judgement = judged(store, (1e-5, 1e-5), (1.0, 1.0), (0.5, 0.5))
    assert judgement.answer == "depends"
    assert list(judgement.findings[0].checks.values()) == [True, True, False]


def test_it_does_not_hold_where_gradients_explode_with_it(store):
    assert judged(store, (0.5, 0.5), (0.5, 0.5), (1e3, 1e3)).answer == "does not hold"


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    plan = small_plan(DATA, seeds=range(5), steps=4)
    assert studied(CLAIM, "deep sigmoid", plan, DATA, store).answer == "holds"
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        assert studied(CLAIM, "deep sigmoid", plan, DATA, fresh).answer != "holds"
