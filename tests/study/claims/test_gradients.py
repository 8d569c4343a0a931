"""Claim 5: gradients by depth, and the verdict that turns with them."""

import pytest
import torch
from study.small import small_data, small_plan, studied, without_normalization
from torch import nn

from batchnorm.study.claims import judge
from batchnorm.study.claims.gradients import CLAIM, gradient_norms, unevenness
from batchnorm.study.interactive import figure
from batchnorm.study.observation import Result, State
from batchnorm.study.pictures import png
from batchnorm.study.store import Store

DATA = small_data()


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


EVENER = [
    "evener at the start, from Xavier's",
    "evener at the start, from He's",
    "evener in training, from Xavier's",
    "evener in training, from He's",
]
WORSE = "plain from He's less even in training than at the start"


def judged(store, **changes):
    """A judgement of gradients that fall by factors from the last hidden layer to the first."""
    plan = small_plan(DATA)
    falls = {
        "plain_xavier": (1e-5, 1e-5),
        "plain_he": (0.1, 1e-3),
        "batchnorm_xavier": (0.5, 0.5),
        "batchnorm_he": (0.5, 0.5),
        **changes,
    }
    for run in CLAIM.tasks(plan, "deep relu"):
        start, later = falls[f"{run.recipe.norm}_{run.recipe.initialization}"]
        # Of six looks, the last two are the last third.
        looks = [start, *[1e-9] * 3, later, later]
        seen = [[step, [fall, 1.0, 1.0, 1.0]] for step, fall in enumerate(looks)]
        made = Result(steps=[5], accuracies=[0.7], observed={"gradient_norms": seen})
        store.add(run, made)
    return judge(CLAIM, ["deep relu"], plan, store)


def failed(judgement):
    """The checks that do not hold."""
    return [name for name, held in judgement.findings[0].checks.items() if not held]


def test_each_normalized_run_has_a_plain_one_of_the_same_initialization():
    tasks = CLAIM.tasks(small_plan(DATA, seeds=(0,)), "deep relu")
    recipes = {(run.recipe.norm, run.recipe.initialization) for run in tasks}
    assert recipes == {(norm, at) for norm in ("plain", "batchnorm") for at in ("xavier", "he")}
    assert {run.steps for run in tasks} == {150}


def test_it_holds_where_normalization_is_evener_and_he_does_not_last(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert list(found.checks) == [*EVENER, WORSE]
    assert found.without == "5.0"
    assert found.with_ == "0.3"
    accuracies = [row.values for row in found.rows if "accuracy" in row.measure]
    assert accuracies == [[70.0, 70.0]] * 4
    (chart,) = judgement.charts
    assert [panel.title for panel in chart.panels] == [
        "deep relu, at the start",
        "deep relu, at the end",
    ]
    assert all(len(panel.series) == 4 for panel in chart.panels)
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"plain_xavier": (0.9, 1e-5)}, [EVENER[0]]),
        ({"plain_he": (0.9, 1e-3)}, [EVENER[1]]),
        ({"plain_xavier": (1e-5, 0.9)}, [EVENER[2]]),
        ({"batchnorm_he": (0.5, 1e-4)}, [EVENER[3]]),
        ({"plain_he": (1e-3, 0.1)}, [WORSE]),
    ],
)
def test_each_check_turns(store, changes, expected):
    judgement = judged(store, **changes)
    assert failed(judgement) == expected
    assert judgement.answer == "depends"


def test_it_does_not_hold_where_gradients_explode_with_it(store):
    everywhere = {"batchnorm_xavier": (1e6, 1e6), "batchnorm_he": (1e6, 1e6)}
    assert judged(store, plain_he=(0.1, 0.1), **everywhere).answer == "does not hold"


def test_a_run_that_broke_off_at_once_is_not_measured(store):
    plan = small_plan(DATA)
    for run in CLAIM.tasks(plan, "deep relu"):
        store.add(run, run.broken("the loss was nan at step 1"))
    assert judge(CLAIM, ["deep relu"], plan, store).answer == "not measured"


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    monkeypatch.setattr("batchnorm.study.claims.gradients._STEPS", 20)
    plan = small_plan(DATA, seeds=range(3))
    assert not set(failed(studied(CLAIM, "deep sigmoid", plan, DATA, store))) & set(EVENER)
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        judgement = studied(CLAIM, "deep sigmoid", plan, DATA, fresh)
        assert set(failed(judgement)) >= set(EVENER)
