"""Turns, rounds, and what is put back; how long things take is no test's business."""

import gc

import pytest
import torch

from batchnorm.bench import harness
from batchnorm.bench.harness import alternate, copy_speed, threads


def test_they_take_turns_and_who_begins_changes():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    times = alternate(calls, 0, least=4)
    assert "".join(turns) == "abcbcacababc"
    assert list(times) == ["a", "b", "c"]
    assert all(len(taken) == 4 and min(taken) >= 0 for taken in times.values())


def test_a_round_has_the_time_of_its_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def call():
            now[0] += seconds

        return call

    times = alternate({"a": taking(1.0), "b": taking(3.0)}, seconds=20, least=2)
    assert times == {"a": [1.0] * 5, "b": [3.0] * 5}


def test_garbage_is_collected_again_afterwards():
    seen = []
    with pytest.raises(KeyboardInterrupt):
        alternate({"a": lambda: seen.append(gc.isenabled()), "b": _interrupted}, 0)
    assert seen == [False]
    assert gc.isenabled()


def _interrupted():
    raise KeyboardInterrupt


def test_threads_are_as_they_were():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyboardInterrupt), threads(before + 1):
        _interrupted()
    assert torch.get_num_threads() == before


def test_a_copy_has_a_speed():
    assert copy_speed(rounds=3, values=1000) > 0
