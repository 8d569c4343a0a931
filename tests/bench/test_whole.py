"""The bench of whole models: its tables, and that nothing wrong is timed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from batchnorm.bench.errors import WrongResult
from benchmarks.models import measure, tables
from benchmarks.models.networks import NETWORKS, Posed
from benchmarks.models.ways import (
    ACCELERATED,
    FOLDED,
    INFERENCE,
    REORDERED,
    SAVING,
    STOCK,
    TRAINING,
    Way,
)


def row(way, mode, **changes):
    base = measure.Row(
        network="ResNet-50", layout="NHWC", mode=mode, way=way.name, batch=16, image=224,
        q25_ms=900.0, median_ms=1000.0, q75_ms=1100.0, ratio=1.0, ratio_q25=0.9, ratio_q75=1.1,
        kept_mb=None, kept=None, peak_mb=None, peak=None, exact=0.0, apart=None, rounds=20,
    )  # fmt: skip
    ratio = changes.get("ratio", 1.0)
    return replace(base, **{"ratio_q25": ratio, "ratio_q75": ratio, **changes})


ROWS = [
    row(STOCK, TRAINING, kept=1.0, peak=1.0, apart=0.0),
    row(REORDERED, TRAINING, ratio=1.01, kept=1.0, apart=3e-4),
    row(ACCELERATED, TRAINING, ratio=1.31, kept=1.06, apart=2e-4),
    row(SAVING, TRAINING, ratio=1.2, kept=0.55, peak=0.6, apart=2e-4),
    row(STOCK, INFERENCE),
    row(FOLDED, INFERENCE, ratio=1.25),
]


def test_the_tables_have_the_speed_of_each_way_and_the_memory_of_training():
    lines = tables.markdown(ROWS).splitlines()
    assert lines[0] == (
        "| model | mode | stock, ms | accelerate | accelerate, save_memory | fold |"
    )
    assert lines[2:4] == [
        "| ResNet-50, NHWC | training | 1000 | 1.31x | 1.20x |  |",
        "| ResNet-50, NHWC | inference | 1000 |  |  | 1.25x |",
    ]
    assert lines[-1] == "| ResNet-50, NHWC | accelerate, save_memory | 0.55 | 0.60 | 2e-04 |"
    assert len(lines) == 4 + 1 + 2 + 3


def test_the_figures_are_those_of_the_first_network():
    lines = tables.figures([*ROWS, replace(ROWS[2], network="other", ratio=9.0)]).splitlines()
    assert "| 1.31x (1.31 to 1.31) |" in lines[2]
    assert "| 0.55 |" in lines[3]
    assert "9.0" not in "".join(lines)


def test_the_picture_is_one():
    assert tables.png(ROWS).startswith(b"\x89PNG")


class Small(nn.Sequential):
    """A network that returns what one of Transformers does."""

    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values.flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})


def small():
    model = Small(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    network = next(iter(NETWORKS.values())).quick()
    images, labels = torch.randn(8, 3, 2, 2), torch.arange(8) % 3
    return Posed(network, "NCHW", model, copy.deepcopy(model).eval(), images, labels)


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch):
    wrong = Way("wrong", lambda model, _: model.apply(_doubled))
    monkeypatch.setattr(measure, "WAYS", (STOCK, wrong))
    with pytest.raises(WrongResult, match="wrong is wrong: in training of ResNet-50"):
        measure.exactness(small(), TRAINING)


def _doubled(module):
    if isinstance(module, nn.BatchNorm1d):
        module.eps = 0.5


def test_each_way_is_measured(monkeypatch):
    monkeypatch.setattr(measure, "WAYS", (STOCK, SAVING))
    first, second = measure.measured(small(), TRAINING, 3, {})
    assert (first.ratio, first.kept, first.apart) == (1.0, 1.0, 0.0)
    assert second.way == SAVING.name
    assert second.kept < 1
    assert second.exact < 1e-12
