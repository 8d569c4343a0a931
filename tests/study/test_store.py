"""The store: what goes in comes out, a torn line goes away, and nothing else does."""

import json
import math
import os

import pytest
from study.errands import Asking, Errand, Note

from batchnorm.study.networks import NETWORKS
from batchnorm.study.observation import Result
from batchnorm.study.recipes import PLAIN
from batchnorm.study.store import Store
from batchnorm.study.tasks import StudyError
from batchnorm.study.training import Run

TASK = Errand("digits", "go")
NOTE = Note(values=[2.25, 1 / 3], process=7)


class Precise(Errand):
    """An errand whose numbers have many digits."""

    kind = "precise errand"
    digits = 17


def test_what_goes_in_comes_out(tmp_path):
    with Store(tmp_path, machine="a machine") as store:
        assert TASK not in store
        store.add(TASK, NOTE)
        written = store[TASK]
    with Store(tmp_path) as store:
        assert TASK in store
        assert store[TASK] == written
        assert store.machine(TASK) == "a machine"
    assert written == Note(values=[2.25, 0.333333333], process=7)  # the digits that float32 has


def test_a_task_says_how_many_digits_are_kept(tmp_path):
    task = Precise("digits", "go")
    with Store(tmp_path) as store:
        store.add(task, NOTE)
        assert store[task].values[1] == 1 / 3


def test_digits_are_cut_wherever_a_number_is(tmp_path):
    third = 1 / 3
    with Store(tmp_path) as store:
        store.add(TASK, Note(values=[(third, [third]), {"a": third}]))
        assert store[TASK].values == [[0.333333333, [0.333333333]], {"a": 0.333333333}]


def test_the_last_outcome_of_a_task_is_the_one(tmp_path):
    other = Errand("digits", "another")
    with Store(tmp_path, machine="first") as store:
        store.add(TASK, Note(process=1))
        store.add(other, Note(process=2))
        store.add(TASK, Note(process=3), machine="second")
        assert store[TASK].process == 3
    with Store(tmp_path, machine="third") as store:
        assert (store[TASK].process, store.machine(TASK)) == (3, "second")
        assert (store[other].process, store.machine(other)) == (2, "first")
        store.add(TASK, Note(process=4))
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    torn = b"".join(lines[:3]) + lines[3][:-1]  # a kill in the middle of the last
    (tmp_path / "results.jsonl").write_bytes(torn)
    with Store(tmp_path) as store:
        assert (store[TASK].process, store.machine(TASK)) == (3, "second")


def test_an_outcome_that_does_not_answer_is_as_good_as_none(tmp_path):
    less, more = (Asking("digits", "a", asked=frozenset(x)) for x in ({1.0}, {1.0, 2.0}))
    with Store(tmp_path) as store:
        store.add(less, Note(values=[1.0]))
        assert less in store
        assert more not in store
        store.add(more, Note(values=[1.0, 2.0]))
        assert less in store
        assert more in store


def test_a_line_is_json_that_says_what_it_is(tmp_path):
    with Store(tmp_path) as store:
        store.add(TASK, NOTE)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert content["kind"] == "errand"
    assert content["key"] == TASK.key
    assert Errand(**content["task"]) == TASK


@pytest.mark.parametrize("torn", ["{", '{"format":1,"key":"abc","outcome":{}}', "\0\0", "é"])
def test_a_torn_last_line_is_cut_off_and_harms_no_other(tmp_path, torn):
    path = tmp_path / "results.jsonl"
    with Store(tmp_path) as store:
        store.add(TASK, NOTE)
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    other = Errand("digits", "another")
    with Store(tmp_path) as store:
        assert other not in store
        store.add(other, Note(process=8))
    with Store(tmp_path) as store:
        assert store[TASK].process == 7
        assert store[other].process == 8
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "foreign",
    [
        *("not json", "[]", '{"a": 1}', "", "\x00", "é"),
        '{"format":1,"key":[],"outcome":{}}',
        '{"format":1,"key":"a","outcome":[]}',
    ],
)
def test_a_foreign_line_is_named_and_nothing_is_changed(tmp_path, foreign):
    path = tmp_path / "results.jsonl"
    with Store(tmp_path) as store:
        store.add(TASK, NOTE)
    content = path.read_bytes() + foreign.encode() + b"\n" + b"torn"
    path.write_bytes(content)
    for _ in range(2):  # the lock is given back
        with pytest.raises(StudyError, match=r"results\.jsonl, line 2: not an outcome") as caught:
            Store(tmp_path)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_lines_of_another_format_are_kept_and_not_used(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"format": 0, "key": TASK.key, "outcome": {}}) + "\n")
    with Store(tmp_path) as store:
        assert TASK not in store
        store.add(TASK, NOTE)
    assert len(path.read_text().splitlines()) == 2


def test_two_studies_in_one_folder_are_refused(tmp_path):
    with (
        Store(tmp_path),
        pytest.raises(StudyError, match="another study is at work in this folder"),
    ):
        Store(tmp_path)
    Store(tmp_path).close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="name another folder"):
        Store(tmp_path / "file")


def test_what_is_no_number_is_refused_before_it_is_written(tmp_path):
    with Store(tmp_path) as store, pytest.raises(ValueError, match="JSON"):
        store.add(TASK, Note(values=[math.nan]))
    assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        monkeypatch.setattr(os, "write", lambda *_: 3)
        with pytest.raises(StudyError, match="disk is full"):
            store.add(TASK, NOTE)


def test_what_an_earlier_outcome_had_besides_is_kept(tmp_path):
    run = Run("digits", NETWORKS["conv"], PLAIN, 1.0, 0, 1)
    with Store(tmp_path) as store:
        store.add(run, Result(steps=[1], observed={"a": [[0, 1]], "b": [[0, 2]]}))
        store.add(run, Result(steps=[2], observed={"b": [[0, 3]], "c": [[0, 4]]}))
        assert store[run].observed == {"a": [[0, 1]], "b": [[0, 3]], "c": [[0, 4]]}
        assert store[run].steps == [2]
