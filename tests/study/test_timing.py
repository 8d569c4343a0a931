"""Times are taken of what agrees, norm by norm; how long it takes is no test's business."""

import pytest
import torch
from study.small import small_data
from torch import nn

from batchnorm.study import timing
from batchnorm.study.networks import NORMS, build
from batchnorm.study.timing import Timing, measure

DATA = small_data()
TIMING = Timing("small", "sigmoid", learning_rate=0.5, repeats=3)


def test_every_norm_has_every_repetition():
    times = measure(TIMING, DATA)
    assert times.reason == ""
    assert list(times.seconds) == list(NORMS)
    assert all(len(taken) == 3 and min(taken) > 0 for taken in times.seconds.values())


def test_the_norms_take_turns_on_the_same_batches(monkeypatch):
    turns = []

    def passed(model, data, learning_rate):
        turns.append((model, [y.tolist() for _, y in data]))
        return [1.0]

    monkeypatch.setattr(timing, "_pass", passed)
    measure(TIMING, DATA)
    plain, theirs, ours = (model for model, _ in turns[:3])
    assert [model for model, _ in turns[3:]] == [
        *(plain, theirs, ours),
        *(theirs, ours, plain),
        *(ours, plain, theirs),
    ]
    assert all(labels == turns[0][1] for _, labels in turns)


def test_an_epoch_counts_whole_where_only_a_part_was_timed(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing, "_LONGEST", 1)
    assert measure(TIMING, DATA).seconds["plain"] == [2.0, 2.0, 2.0]  # two batches an epoch


def test_what_does_not_agree_is_not_timed(monkeypatch):
    def wrong(network, norm, shape, classes, seed):
        model = build(network, norm, shape, classes, seed)
        if norm == "batchnorm":
            model.append(nn.Hardtanh(-0.1, 0.1))
        return model

    monkeypatch.setattr(timing, "build", wrong)
    with pytest.raises(ArithmeticError, match=r"torch\.nn has the loss .* at step 1, batchnorm"):
        measure(TIMING, DATA)


def test_the_threads_are_as_they_were():
    before = torch.get_num_threads()
    measure(TIMING, DATA)
    assert torch.get_num_threads() == before
