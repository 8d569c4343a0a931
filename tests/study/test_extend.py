"""Extensions: what a file brings is found, named by its content, and measured like the rest."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from batchnorm.study.conduct import Wanted, conduct
from batchnorm.study.extend import Brought, bring
from batchnorm.study.recipes import PLAIN
from batchnorm.study.tasks import StudyError
from batchnorm.study.training import Run

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
MINE = re.search("```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_file_brings_networks_data_and_claims(mine):
    brought = bring([str(mine)])
    assert [network.name for network in brought.networks] == ["shallow"]
    assert [form.kind for form in brought.forms] == ["text"]
    assert [claim.name for claim in brought.claims] == ["mine"]
    assert bring([]) == Brought([], [], [])


def test_a_run_is_done_again_when_the_file_has_changed(mine):
    def key():
        (network,) = bring([str(mine)]).networks
        return Run("digits", network, PLAIN, 1.0, 0, 1).key

    first = key()
    assert key() == first
    mine.write_text(MINE + "# changed\n")
    assert key() != first


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1", "got no Network, DataForm or Claim"),
        ("import nothing_like_it", "failed with ModuleNotFoundError"),
        ("1 / 0", "failed with ZeroDivisionError"),
        (MINE.replace('Network("shallow"', 'Network("conv"'), "the network 'conv' exists already"),
        (MINE.replace('"text"', '"npz"'), "the data 'npz' exists already"),
        (MINE.replace("number=0", "number=3"), "the claim '3' exists already"),
    ],
)
def test_what_cannot_be_brought_is_refused(tmp_path, content, words):
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(StudyError, match=words) as caught:
        bring([str(path)])
    assert "\n" not in str(caught.value)


def test_no_such_file_is_refused(tmp_path):
    with pytest.raises(StudyError, match="FileNotFoundError"):
        bring([str(tmp_path / "none.py")])
    with pytest.raises(StudyError, match="ModuleNotFoundError"):
        bring(["no_such_module"])


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_of_all_that_was_brought(mine, tmp_path, jobs):
    rows = np.random.default_rng(0).normal(size=(150, 5)).round(3)
    rows[:, -1] = rows[:, 0] > 0
    np.savetxt(tmp_path / "rows.txt", rows)
    wanted = Wanted(f"text:{tmp_path}/rows.txt", "mine", "30s", extensions=[str(mine)], jobs=jobs)
    conduct(wanted, tmp_path / "out", console=Console(file=io.StringIO()))
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    runs = [line for line in map(json.loads, lines) if line["kind"] == "run"]
    assert len([run for run in runs if run["task"]["network"]["name"] == "shallow"]) == 10
    for run in runs:
        assert run["outcome"]["reason"] == ""
        (look,) = run["outcome"]["observed"]["largest_weight"]
        assert look[0] == len(run["outcome"]["losses"])
        named = run["task"]["network"]
        assert ("@" in named["layers"]) == (named["name"] == "shallow")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Larger weights" in page
    assert f"--extend {mine}" in page
