"""Times are taken of what agrees, norm by norm; how long it takes is no test's business."""

import pytest
import torch
from study.small import small_data
from torch import nn

import batchnorm as bn
from batchnorm.study import timing
from batchnorm.study.networks import NETWORKS, build, norms
from batchnorm.study.recipes import TORCH
from batchnorm.study.timing import Timing, measure

DATA = small_data()
TIMING = Timing("small", NETWORKS["sigmoid"], repeats=3)
NORMS = ["plain", "torch", "batchnorm"]


def test_every_norm_has_every_repetition():
    times = measure(TIMING, DATA)
    assert times.reason == ""
    assert list(times.training) == NORMS
    assert list(times.inference) == [*NORMS, "folded"]
    for taken in (*times.training.values(), *times.inference.values()):
        assert len(taken) == 3
        assert min(taken) > 0


def test_the_norms_take_turns():
    calls = []
    seconds = timing._in_turn(calls.append, ["a", "b", "c"], 4, 1.0)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_an_epoch_counts_whole_where_only_a_part_was_timed(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing, "_LONGEST", 1)
    times = measure(TIMING, DATA)
    assert times.training["plain"] == [2.0, 2.0, 2.0]  # two batches an epoch
    assert times.inference["folded"] == [2.0, 2.0, 2.0]


def test_training_that_does_not_agree_is_not_timed(monkeypatch):
    def wrong(network, recipe, *others, **settings):
        model = build(network, recipe, *others, **settings)
        if recipe.norm == "batchnorm":
            model.append(nn.Hardtanh(-0.1, 0.1))
        return model

    monkeypatch.setattr(timing, "build", wrong)
    with pytest.raises(ArithmeticError, match=r"torch\.nn has the loss .* at step 1, batchnorm"):
        measure(TIMING, DATA)


def test_predictions_that_do_not_agree_are_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "fold", lambda model, x: (nn.Sequential(model, nn.Softmax(1)), x))
    with pytest.raises(ArithmeticError, match="folding changes a prediction by"):
        measure(TIMING, DATA)


@pytest.mark.parametrize("network", ["sigmoid", "conv", "residual"])
def test_every_norm_of_a_network_can_be_folded(network):
    model = build(NETWORKS[network], TORCH, (1, 8, 8), 10, seed=0).eval()
    whole, report = bn.fold(model, torch.randn(30, 1, 8, 8))
    assert not norms(whole)
    assert not report.left


def test_the_threads_are_as_they_were():
    before = torch.get_num_threads()
    measure(TIMING, DATA)
    assert torch.get_num_threads() == before
