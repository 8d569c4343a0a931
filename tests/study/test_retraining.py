"""Shifts, and what can be done about each: the table of `batchnorm study shifts`."""

import io

import numpy as np
import pytest
from rich.console import Console
from study.small import small_data, small_plan
from typer.testing import CliRunner

from batchnorm import cli
from batchnorm.study import retraining
from batchnorm.study.measures.retraining import Shifted
from batchnorm.study.shifts import SEVERITIES, SHIFTS, shift
from batchnorm.study.tasks import StudyError

DATA = small_data()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(retraining, "load", lambda _: DATA)
    monkeypatch.setattr(retraining, "plan", lambda data: small_plan(data, seeds=(0, 1), steps=4))


def test_a_treatment_shifts_what_is_trained_on_and_what_is_tried():
    treated = Shifted("blur", 3)(DATA)
    for found, inputs, seed in (
        (treated.train_inputs, DATA.train_inputs, 0),
        (treated.test_inputs, DATA.test_inputs, 1),
    ):
        low, high = DATA.train_inputs.min(), DATA.train_inputs.max()
        expected = shift(inputs, "blur", 3, low=low, high=high, seed=seed)
        np.testing.assert_array_equal(found, expected)
    assert np.array_equal(treated.test_labels, DATA.test_labels)
    made = small_plan(DATA)
    runs = {
        made.run("relu", retraining.NORMALIZED, treatment=Shifted(*each)).key
        for each in (("blur", 3), ("blur", 4), ("noise", 3))
    }
    assert len(runs) == 3  # each is kept under a key of its own
    assert "blur 3" in str(made.run("relu", retraining.NORMALIZED, treatment=Shifted("blur", 3)))


def test_the_table_has_every_shift_and_severity_and_is_made_once(small, tmp_path):
    console = Console(file=io.StringIO())
    table = retraining.conduct("small", "relu", tmp_path, jobs=2, console=console)
    assert (tmp_path / "shifts.md").read_text() == f"{table}\n"
    assert (tmp_path / "shifts.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["none", *np.repeat(SHIFTS, len(SEVERITIES))]
    for row in rows[1:]:
        assert all(0 <= float(cell.strip(" %")) <= 100 for cell in row[3:])
    before = (tmp_path / "results.jsonl").read_bytes()
    assert retraining.conduct("small", "relu", tmp_path, console=console) == table
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_network_that_is_not_there(small, tmp_path):
    with pytest.raises(StudyError, match="--network vgg: expected one of sigmoid, tanh"):
        retraining.conduct("small", "vgg", tmp_path, console=Console())


def test_a_run_that_broke_off_is_told(small, tmp_path, monkeypatch):
    def failing(tasks, data_set, store, **_):
        for task in tasks:
            store.add(task, task.broken("the loss was nan"))

    monkeypatch.setattr(retraining, "complete", failing)
    with pytest.raises(StudyError, match=r"a run broke off .*: the loss was nan"):
        retraining.conduct("small", "relu", tmp_path, console=Console())


def test_the_command(small, tmp_path):
    arguments = ["study", "shifts", "--network", "relu", "--out", str(tmp_path)]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "| brightness | 1 |" in shown.stdout
    wrong = CliRunner().invoke(cli.app, [*arguments[:2], "--network", "x", "--out", str(tmp_path)])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("batchnorm: --network x: expected one of")
