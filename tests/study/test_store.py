"""The store: what goes in comes out, a torn line goes away, and nothing else does."""

import json
import math
import os

import pytest
from study.small import Errand, Note

from batchnorm.study.store import Store
from batchnorm.study.tasks import StudyError
from batchnorm.study.training import Result, Run

RUN = Run("digits", "sigmoid", "plain", 1.0, 0, 1)
RESULT = Result(losses=[2.25, 1 / 3], steps=[1, 2], accuracies=[0.5, 0.75], seconds=1.5)


def test_what_goes_in_comes_out(tmp_path):
    with Store(tmp_path, machine="a machine") as store:
        assert RUN not in store
        store.add(RUN, RESULT)
        written = store[RUN]
    with Store(tmp_path) as store:
        assert RUN in store
        assert store[RUN] == written
        assert store.machine(RUN) == "a machine"
    assert written.losses == [2.25, 0.333333333]  # as many digits as float32 has
    assert (written.steps, written.seconds) == ([1, 2], 1.5)


def test_float64_keeps_all_its_digits(tmp_path):
    run = Run("digits", "sigmoid", "plain", 1.0, 0, 1, dtype="float64")
    with Store(tmp_path) as store:
        store.add(run, RESULT)
        assert store[run].losses[1] == 1 / 3


def test_a_line_is_json_that_says_what_it_is(tmp_path):
    with Store(tmp_path) as store:
        store.add(RUN, RESULT)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert content["kind"] == "run"
    assert content["key"] == RUN.key
    assert Run(**content["task"]) == RUN


@pytest.mark.parametrize("torn", ["{", '{"format":1,"key":"abc","outcome":{}}', "\0\0", "é"])
def test_a_torn_last_line_is_cut_off_and_harms_no_other(tmp_path, torn):
    path = tmp_path / "results.jsonl"
    with Store(tmp_path) as store:
        store.add(RUN, RESULT)
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    other = Errand("digits", "go")
    with Store(tmp_path) as store:
        assert other not in store
        store.add(other, Note(process=7))
    with Store(tmp_path) as store:
        assert store[RUN].steps == [1, 2]
        assert store[other].process == 7
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize("foreign", ["not json", "[]", '{"a": 1}', "", "\x00", "é"])
def test_a_foreign_line_is_named_and_nothing_is_changed(tmp_path, foreign):
    path = tmp_path / "results.jsonl"
    with Store(tmp_path) as store:
        store.add(RUN, RESULT)
    content = path.read_bytes() + foreign.encode() + b"\n" + b"torn"
    path.write_bytes(content)
    for _ in range(2):  # the lock is given back
        with pytest.raises(StudyError, match=r"results\.jsonl, line 2: not an outcome") as caught:
            Store(tmp_path)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_lines_of_another_format_are_kept_and_not_used(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"format": 0, "key": RUN.key, "outcome": {}}) + "\n")
    with Store(tmp_path) as store:
        assert RUN not in store
        store.add(RUN, RESULT)
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
        store.add(RUN, Note(values=[math.nan]))
    assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        monkeypatch.setattr(os, "write", lambda *_: 3)
        with pytest.raises(StudyError, match="disk is full"):
            store.add(RUN, RESULT)
