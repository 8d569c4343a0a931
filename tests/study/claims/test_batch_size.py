"""Claim 18: small batches against large ones, made up and real, and the verdict by them."""

import pytest
import torch
from study.small import plan_of, result, small_data, small_plan, studied, without_normalization
from torch import nn

from batchnorm.study.claims import judge
from batchnorm.study.claims.batch_size import CLAIM, loss_of_batches_and_alone
from batchnorm.study.interactive import figure
from batchnorm.study.observation import State
from batchnorm.study.pictures import png
from batchnorm.study.store import Store

DATA = small_data()


def state(model, size, last=True):
    """A state in which batches of a size are trained."""
    examples = torch.randn(10, 2), torch.arange(10) % 2
    batch = examples[0][:size], examples[1][:size]
    return State(model, 9, last, 1.0, batch, examples, examples, DATA)


def test_both_losses_are_the_same_without_normalization():
    together, alone = loss_of_batches_and_alone(state(nn.Linear(2, 2), 3))
    assert together == pytest.approx(alone)


def test_the_loss_of_batches_is_by_their_own_moments():
    layer = nn.BatchNorm1d(2, affine=False, momentum=1.0)
    seen = state(layer, 5)
    x, y = seen.trained
    expected = [
        nn.functional.cross_entropy(nn.functional.batch_norm(part, None, None, training=True), of)
        for part, of in zip(x.split(5), y.split(5), strict=True)
    ]
    together, alone = loss_of_batches_and_alone(seen)
    assert together == pytest.approx(sum(expected).item() / 2)
    scaled = x / (1 + layer.eps) ** 0.5  # the running statistics are still 0 and 1
    assert alone == pytest.approx(nn.functional.cross_entropy(scaled, y).item())
    assert layer.training
    assert layer.num_batches_tracked == 0


def test_it_looks_at_the_end_alone():
    assert loss_of_batches_and_alone(state(nn.Linear(2, 2), 3, last=False)) is None


def test_a_loss_that_is_no_number_is_kept_as_a_large_one():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, float("inf"))
    assert loss_of_batches_and_alone(state(model, 5)) == [1e30, 1e30]


def test_ghost_batches_are_large_and_share_the_largest_with_batch_normalization():
    tasks = CLAIM.tasks(plan_of(0.1, seeds=(0,)), "conv")
    assert len(tasks) == 4 * 7
    assert len(set(tasks)) == 4 * 7 - 1
    ghost = [run for run in tasks if run.recipe.norm == "ghost"]
    assert [run.recipe.group for run in ghost] == [2, 4, 8, 16, 32, 64]
    assert {run.batch_size for run in ghost} == {128}
    assert {run.steps for run in tasks} == {50}


def judged(store, ghost=0.8, gap=0.5, large=0.9, reason="", sign=1):
    """A judgement of the accuracy in small groups, and of the gap in small batches."""
    plan = plan_of(0.1)
    for run in CLAIM.tasks(plan, "conv"):
        small = (run.recipe.group if run.recipe.norm == "ghost" else run.batch_size) <= 8
        end = (ghost if run.recipe.norm == "ghost" else 0.5) if small else large
        apart = (gap if small else 0.1) * sign**run.seed + 0.01 * run.seed
        seen = [[100, [1.0 + apart, 1.0]]]
        observed = {"loss_of_batches_and_alone": [] if reason else seen} if run.probes else {}
        store.add(run, result([end] * 4, reason, observed=observed))
    return judge(CLAIM, ["conv"], plan, store)


def test_it_holds_where_small_batches_do_worse_by_both(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert (found.without, found.with_, found.effect) == ("90.0%", "80.0%", "-10 (-10 to -10)")
    effects = {(row.condition, row.measure): row.effect for row in found.rows if row.effect}
    assert effects["plain, k up to 8", "accuracy, %"].value == pytest.approx(-40)
    gap = "|loss by batches − by running|"
    assert effects["batchnorm, k up to 8", gap].value == pytest.approx(0.4)
    accuracy, gap = judgement.charts
    assert [len(chart.panels[0].series) for chart in (accuracy, gap)] == [4, 3]
    for chart in (accuracy, gap):
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


def test_gaps_of_either_sign_do_not_cancel(store):
    (found,) = judged(store, gap=0.5, sign=-1).findings
    assert found.checks["a larger gap in small batches"]
    (row,) = [row for row in found.rows if row.condition == "batchnorm, k up to 8"][1:]
    # Of the seeds 0, 1, 2, the second one's gap is below 0.
    assert row.values == pytest.approx([0.5, 0.49, 0.52])


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"ghost": 0.9}, "depends"),
        ({"gap": 0.1}, "depends"),
        ({"ghost": 0.95, "gap": 0.0}, "does not hold"),
        ({"large": 0.12}, "not measured"),
        ({"reason": "the loss was nan at step 3"}, "not measured"),
    ],
)
def test_each_check_turns(store, changes, answer):
    assert judged(store, **changes).answer == answer


def test_it_turns_when_normalization_is_taken_away(store, tmp_path, monkeypatch):
    plan = small_plan(DATA, seeds=range(3), steps=60)
    assert studied(CLAIM, "tanh", plan, DATA, store).answer == "holds"
    without_normalization(monkeypatch)
    with Store(tmp_path / "without") as fresh:
        assert studied(CLAIM, "tanh", plan, DATA, fresh).answer == "does not hold"
