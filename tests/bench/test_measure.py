"""Right before fast: nothing is timed that was not checked."""

import pytest
import torch
from bench.small import small_case

from batchnorm.bench import measure as module
from batchnorm.bench.cases import Wanted, plan
from batchnorm.bench.contenders import BASE, NATIVE, Step
from batchnorm.bench.errors import WrongResult
from batchnorm.bench.measure import measure
from batchnorm.bench.problem import pose

WITHOUT = [NATIVE.name, "native, mapped"] if NATIVE.missing() else []


def test_everybody_in_every_case_is_timed_and_checked():
    wanted = Wanted.parse("8x4", "float32", "forward,inference", "1", "eager")
    cases = plan(wanted, 1)
    taken = list(measure(cases, 0, WITHOUT))
    assert [found.case for found in taken] == cases
    for _, times, errors in taken:
        assert list(times) == [n for n in ("torch.nn", "native", "eager") if n not in WITHOUT]
        assert all(len(rounds) >= 5 for rounds in times.values())
        assert times.keys() == errors.keys()
        assert max(errors.values()) < 1e-6


def test_who_is_left_out_is_not_timed():
    (taken,) = measure([small_case()], 0, ["native", "native, mapped"])
    assert list(taken.times) == ["torch.nn"]


def test_a_problem_is_posed_once_for_all_its_cases(monkeypatch):
    posed = []

    def once(problem, modes):
        posed.append(modes)
        return pose(problem, modes)

    monkeypatch.setattr(module, "pose", once)
    cases = [small_case(mode=mode) for mode in ("forward", "inference")]
    assert len(list(measure(cases, 0, WITHOUT))) == 2
    assert posed == [{"forward", "inference"}]


class Wrong:
    """Forgets that dx depends on the moments."""

    name, ours = "wrong", False

    def missing(self):
        return None

    def step(self, case, posed):
        step = BASE.step(case, posed)

        def call():
            y, dx, *others = step.call()
            return y, dx * 1.01, *others

        return Step(call)


def test_a_wrong_contender_is_caught_before_any_time_is_taken(monkeypatch):
    monkeypatch.setattr(module, "contenders", lambda case: [BASE, Wrong()])
    monkeypatch.setattr(module, "alternate", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(WrongResult, match="wrong is wrong: its dx is off"):
        list(measure([small_case()], 0))


def test_the_case_has_its_threads_and_they_are_put_back(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "alternate", lambda calls, _: seen.append(torch.get_num_threads()) or calls
    )
    before = torch.get_num_threads()
    list(measure([small_case(threads=2), small_case(threads=1)], 0, WITHOUT))
    assert seen == [2, 1]
    assert torch.get_num_threads() == before
