"""Claim 14: the share in the linear part, counted, and the verdict that turns with it."""

from dataclasses import replace

import pytest
import torch
from study.small import plan_of, small_data, small_plan, studied
from torch import nn

from batchnorm.study.claims import judge
from batchnorm.study.claims.affine import CLAIM, linear_share
from batchnorm.study.interactive import figure
from batchnorm.study.networks import NETWORKS
from batchnorm.study.observation import Result, State
from batchnorm.study.pictures import png

DATA = small_data()


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh()])
def test_the_share_is_counted(activation):
    scale = 2 if isinstance(activation, nn.Sigmoid) else 1  # sigmoid(2z) is linear where tanh is
    model = nn.Sequential(nn.Identity(), activation)
    z = torch.tensor([[-3.0, 0.0], [0.6, 0.7], [0.0, 0.69], [3.0, 0.5]])
    batch = scale * z, torch.zeros(4, dtype=torch.int64)
    state = State(model, 0, False, 1.0, batch, batch, batch, DATA)
    ((share, mean, spread),) = linear_share(state)
    assert share == pytest.approx(5 / 8)
    assert mean == pytest.approx(scale * (0.15 + 0.4725) / 2)
    assert spread == pytest.approx(float(scale * z.std(0).mean()))
    assert not activation._forward_hooks


def test_a_normalized_input_is_in_the_linear_part_as_often_as_a_standard_normal_one():
    model = nn.Sequential(nn.BatchNorm1d(50, affine=False), nn.Sigmoid())
    batch = 3 + 10 * torch.randn(2000, 50), torch.zeros(2000, dtype=torch.int64)
    state = State(model, 0, False, 1.0, batch, batch, batch, DATA)
    ((share, mean, spread),) = linear_share(state)
    assert share == pytest.approx(0.834, abs=0.01)
    assert (mean, spread) == pytest.approx((0, 1), abs=1e-3)


def judged(store, trained=(0.6, 0.95), absent=(0.8, 0.90), apart=0.0, reason=""):
    """A judgement of shares and accuracies, by what is done with gamma and beta."""
    sigmoid = replace(NETWORKS["sigmoid"], steps=100)
    plan = replace(plan_of(1.0), networks={"sigmoid": sigmoid})
    for run in CLAIM.tasks(plan, "sigmoid"):
        share, end = trained if run.recipe.affine == "trained" else absent
        off = apart if run.recipe.affine == "fixed" else 0.0
        seen = [
            [step, [[of, 0.1, 1.0], [of + 0.1, 0.1, 1.0]]] for step, of in ((0, 0.8), (9, share))
        ]
        made = Result(
            losses=[1.0, 0.5 + off],
            steps=[1, 2],
            accuracies=[end, end],
            observed={"linear_share": [] if reason else seen},
            reason=reason,
        )
        store.add(run, made)
    return judge(CLAIM, ["sigmoid"], plan, store)


def test_it_holds_where_gamma_and_beta_take_it_out_and_are_worth_it(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_, found.effect) == ("85.0%", "65.0%", "+20 (+20 to +20)")
    share, accuracy = judgement.charts
    assert share.panels[0].series[0].x == [1, 9]
    for chart in (share, accuracy):
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trained": (0.8, 0.95)}, [False, True, True]),
        ({"trained": (0.6, 0.90)}, [True, False, True]),
        ({"apart": 0.01}, [True, True, False]),
        ({"apart": 1e-4}, [True, True, True]),
        ({"trained": (0.9, 0.85), "apart": 0.01}, [False, False, False]),
    ],
)
def test_each_check_turns(store, changes, expected):
    assert list(judged(store, **changes).findings[0].checks.values()) == expected


def test_nothing_learned_is_not_measured(store):
    assert judged(store, (0.6, 0.1), (0.8, 0.1)).answer == "not measured"


def test_runs_that_broke_off_are_not_measured(store):
    judgement = judged(store, reason="the loss was nan at step 3")
    assert judgement.answer == "not measured"
    assert judgement.charts == []


def test_fixed_and_absent_are_the_same_in_training(store):
    plan = small_plan(DATA, steps=30)
    judgement = studied(CLAIM, "tanh", plan, DATA, store)
    (found,) = judgement.findings
    assert found.checks["fixed and absent are the same"]
    shares = {row.condition: row.values for row in found.rows if "linear part" in row.measure}
    assert shares["fixed"] == pytest.approx(shares["absent"])
    assert shares["trained"] != pytest.approx(shares["absent"])
