"""Claim 15: gamma and beta that undo the normalization of a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from study.small import small_data, small_plan, studied

from batchnorm.study.claims import identity, judge
from batchnorm.study.claims.identity import CLAIM, Differences
from batchnorm.study.interactive import figure
from batchnorm.study.measures import implementations
from batchnorm.study.pictures import png

DATA = small_data()
PLAN = small_plan(DATA, seeds=(0, 1, 2))
NAMES = ("reference", "torch.nn", "batchnorm")


def test_a_batch_comes_out_as_it_went_in(store):
    judgement = studied(CLAIM, "layer", PLAN, DATA, store)
    assert judgement.answer == "holds"
    rows = {
        (row.condition, row.measure.split()[-1]): row.values for row in judgement.findings[0].rows
    }
    assert max(rows["batchnorm", "float64"]) < 1e-12
    # With gamma = 1 and beta = 0, and on a batch of other moments, it does not.
    assert min(rows["γ=1, β=0", "float64"]) > 1
    assert min(rows["another batch", "float64"]) > 0.01
    (chart,) = judgement.charts
    assert [panel.title for panel in chart.panels] == ["float64", "float32"]
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


def test_features_of_any_scale_come_out_as_they_went_in(store):
    scales = np.array([1e-3, 1.0, 1e4, 0.0], np.float32)[:, None, None]
    inputs = np.random.default_rng(0).random((100, 4, 1, 1)).astype(np.float32) * scales
    data = replace(DATA, train_inputs=inputs, train_labels=DATA.train_labels[:100])
    assert studied(CLAIM, "layer", small_plan(data), data, store).answer == "holds"


def test_a_difference_is_in_units_of_its_channel():
    x = torch.tensor([[1.0, 100.0], [-4.0, 50.0]])
    assert identity._apart(x + 1, x) == pytest.approx(0.25)
    assert identity._apart(torch.ones(2, 1), torch.zeros(2, 1)) == 1


@pytest.mark.parametrize(
    ("double", "single", "answer"),
    [(1e-15, 1e-7, "holds"), (1e-9, 1e-7, "depends"), (1e-2, 1e-2, "does not hold")],
)
def test_one_implementation_that_is_off_decides(store, double, single, answer):
    others = {"another batch": 1.0, "γ=1, β=0": 1.0}
    for task in CLAIM.tasks(PLAN, "layer"):
        off = task.seed == 1
        largest = {
            dtype: {**dict.fromkeys(NAMES, 0.0), **others, "batchnorm": worst if off else 0.0}
            for dtype, worst in (("float64", double), ("float32", single))
        }
        store.add(task, Differences(largest=largest))
    assert judge(CLAIM, ["layer"], PLAN, store).answer == answer


def test_it_turns_where_a_layer_has_another_eps(store, monkeypatch):
    right = implementations.NORMALIZE["batchnorm"]

    def off(x, gamma, beta, eps=1e-3):
        return right(x, gamma, beta, eps)

    monkeypatch.setattr(identity, "NORMALIZE", {**implementations.NORMALIZE, "batchnorm": off})
    assert studied(CLAIM, "layer", PLAN, DATA, store).answer == "does not hold"


def test_what_broke_off_is_not_measured(store):
    for task in CLAIM.tasks(PLAN, "layer"):
        store.add(task, Differences(reason="no memory"))
    assert judge(CLAIM, ["layer"], PLAN, store).answer == "not measured"
