"""The original experiment: its network, its percentiles, its picture."""

import numpy as np
import pytest
import torch
from study.small import small_data, small_plan, studied
from torch import nn

import batchnorm as bn
from batchnorm.study import paper
from batchnorm.study.claims import judge
from batchnorm.study.interactive import figure
from batchnorm.study.networks import maps, norms
from batchnorm.study.observation import Result, State
from batchnorm.study.paper import CLAIM, STEPS, last_inputs
from batchnorm.study.pictures import png

DATA = small_data()


def test_the_runs_are_those_of_the_paper():
    runs = CLAIM.tasks(small_plan(DATA), "sigmoid")
    assert {run.recipe.norm for run in runs} == {"plain", "batchnorm"}
    assert {(run.steps, run.batch_size, run.network.activation) for run in runs} == {
        (STEPS, 60, "sigmoid"),
    }
    assert STEPS == 50_000


def test_the_percentiles_are_of_one_unit():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Sigmoid(), nn.Linear(2, 2), nn.Sigmoid())
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        model[2].bias.zero_()
        model[0].weight.fill_(1.0)
    x = torch.logit(torch.linspace(0.01, 0.99, 99))[:, None]
    state = State(model.train(), 0, False, 1.0, (x, x), (x, x), (x, x), DATA)
    expected = np.percentile(np.linspace(0.01, 0.99, 99), (15, 50, 85))
    assert last_inputs(state) == pytest.approx(expected.tolist(), rel=1e-5)
    assert not model[3]._forward_pre_hooks


def test_they_are_normalized_by_their_own_moments_without_a_trace():
    model = nn.Sequential(nn.Linear(1, 1), bn.BatchNorm1d(1), nn.Sigmoid())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = 100 + 50 * torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    state = State(model, 0, False, 1.0, (x, x), (x, x), (x, x), DATA)
    z = ((x - x.mean()) / x.std(correction=0)).numpy() * np.sign(model[0].weight.item())
    assert last_inputs(state) == pytest.approx(np.percentile(z, (15, 50, 85)).tolist(), abs=1e-3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def judged(store, sooner, steadier):
    plan = small_plan(DATA)
    for run in CLAIM.tasks(plan, "sigmoid"):
        normalized = run.recipe.normalized
        step = 2 if normalized and sooner else 3
        drift = 0.1 if normalized and steadier else 5.0
        seen = [[s, [-1.0 + s * drift, s * drift, 1.0 + s * drift]] for s in (0, 1, 2)]
        accuracies = [0.1] * step + [0.9] * (5 - step)
        store.add(
            run,
            Result(
                steps=[1, 10, 100, 1000, 50000],
                accuracies=accuracies,
                observed={"last_inputs": seen},
            ),
        )
    return judge(CLAIM, ["sigmoid"], plan, store)


@pytest.mark.parametrize(
    ("sooner", "steadier", "answer"),
    [(True, True, "holds"), (True, False, "depends"), (False, False, "does not hold")],
)
def test_the_verdict_is_of_steps_and_percentiles(store, sooner, steadier, answer):
    judgement = judged(store, sooner, steadier)
    assert judgement.answer == answer
    assert judgement.findings[0].without == "1000"
    # Each percentile ranges by twice the drift, and the spread is 2 at every look.
    assert judgement.findings[0].rows[4].values == pytest.approx([5.0, 5.0])
    (chart,) = judgement.charts
    assert [panel.title for panel in chart.panels] == ["(a) accuracy", "(b) plain", "(c) batchnorm"]
    assert [line.name for line in chart.panels[1].series] == ["15%", "50%", "85%"]
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


def test_it_runs_from_end_to_end(store, monkeypatch):
    monkeypatch.setattr(paper, "STEPS", 40)
    judgement = studied(CLAIM, "sigmoid", small_plan(DATA), DATA, store)
    assert len(judgement.findings[0].rows) == 6
    (run, *_) = CLAIM.tasks(small_plan(DATA), "sigmoid")
    assert run.steps == 40
    assert len(store[run].seen(last_inputs)) > 15  # often enough for a picture


def test_the_weights_are_a_small_gaussian():
    from batchnorm.study.networks import build

    run, *_ = CLAIM.tasks(small_plan(DATA), "sigmoid")
    model = build(run.network, run.recipe, (1, 28, 28), 10, 0)
    assert [layer.weight.shape[0] for layer in maps(model)] == [100, 100, 100, 10]
    assert not norms(model)
    assert maps(model)[0].weight.std().item() == pytest.approx(0.1, rel=0.02)
