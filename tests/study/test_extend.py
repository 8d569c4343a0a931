"""Extensions: what a file brings is found, named by its content, and measured like the rest."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from rich.console import Console

from batchnorm.study.claims import all_claims
from batchnorm.study.conduct import Wanted, conduct
from batchnorm.study.extend import Brought, bring
from batchnorm.study.networks import build, maps
from batchnorm.study.recipes import PLAIN
from batchnorm.study.tasks import StudyError
from batchnorm.study.training import Run

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
MINE = re.search("```python\n(.*?)```", TEXT, re.DOTALL)[1]


LAYERS = """
import numpy as np
from torch import nn
from batchnorm.study.networks import Network

""" + re.search("def layers.*?^SHALLOW.*?$", MINE, re.DOTALL | re.MULTILINE)[0]


def key(network):
    return Run("digits", network, PLAIN, 1.0, 0, 1).key


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_the_page_names_the_claims_about_any_network():
    (sentence,) = re.findall(r"about any network measures yours, too: (.*?)\.", TEXT, re.DOTALL)
    named = re.findall(r"\w+", sentence.replace(" and ", " "))
    assert named == [claim.key for claim in all_claims() if claim.any_network]


def test_a_file_brings_networks_data_and_claims(mine):
    brought = bring([str(mine)])
    assert [network.name for network in brought.networks] == ["shallow"]
    assert [form.kind for form in brought.forms] == ["text"]
    assert [claim.name for claim in brought.claims] == ["mine"]
    assert bring([]) == Brought([], [], [])


def test_a_run_is_done_again_when_the_file_has_changed(mine):
    first = key(*bring([str(mine)]).networks)
    assert key(*bring([str(mine)]).networks) == first
    mine.write_text(MINE + "# changed\n")
    assert key(*bring([str(mine)]).networks) != first


def test_a_name_for_the_same_and_names_of_the_study_are_no_more_than_names(mine):
    names = "AGAIN = SHALLOW\nfrom batchnorm.study.claims.affine import CLAIM\n"
    mine.write_text(
        MINE + names + "from batchnorm.study.networks import NETWORKS\nCONV = NETWORKS['conv']\n"
    )
    brought = bring([str(mine)])
    assert [network.name for network in brought.networks] == ["shallow"]
    assert [claim.name for claim in brought.claims] == ["mine"]


def test_two_files_of_one_name_are_two(tmp_path):
    for folder, width in (("a", 16), ("b", 8)):
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir()
        content = LAYERS.replace("16", str(width))
        path.write_text(content.replace("shallow", f"shallow {folder}"))
    networks = bring([str(tmp_path / folder / "mine.py") for folder in "ab"]).networks
    sent = [cloudpickle.loads(cloudpickle.dumps(network)) for network in networks]
    assert [maps(build(it, PLAIN, (1, 2, 2), 2, 0))[0].out_features for it in sent] == [16, 8]


def test_a_file_that_has_moved_keeps_its_runs(mine, tmp_path):
    first = key(*bring([str(mine)]).networks)
    moved = tmp_path / "folder" / "mine.py"
    moved.parent.mkdir()
    mine.rename(moved)
    assert key(*bring([str(moved)]).networks) == first


def test_a_package_is_brought_as_a_whole(tmp_path, monkeypatch):
    name = f"package_{tmp_path.name}"
    package = tmp_path / name
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").write_text(f"from {name}.parts import SHALLOW")
    (package / "parts.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(tmp_path)

    first = key(*bring([f"{name}.inner"]).networks)
    code = "import sys, cloudpickle; print(cloudpickle.load(sys.stdin.buffer).layers)"
    (network,) = bring([f"{name}.inner"]).networks
    done = subprocess.run(
        [sys.executable, "-c", code], input=cloudpickle.dumps(network), capture_output=True
    )
    assert b"<function layers" in done.stdout, done.stderr  # where nobody can import it
    assert key(*bring([f"{name}.inner"]).networks) == first
    (package / "later.py").touch()
    assert key(*bring([f"{name}.inner"]).networks) != first


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1", "got no Network, DataForm or Claim"),
        ("import nothing_like_it", "failed with ModuleNotFoundError"),
        ("1 / 0", "failed with ZeroDivisionError"),
        (MINE.replace('Network("shallow"', 'Network("conv"'), "the network 'conv' exists already"),
        (MINE.replace('"text"', '"npz"'), "the data 'npz' exists already"),
        (MINE.replace("number=0", "number=3"), "the claim '3' exists already"),
        (
            MINE.replace("number=0", "number=30").replace('"mine"', '"identity"'),
            "'identity' exists",
        ),
        (MINE + "import dataclasses\nOTHER = dataclasses.replace(SHALLOW)", "'shallow' exists"),
        ("from batchnorm.study.claims.affine import CLAIM", "got no Network, DataForm or Claim"),
        ("import sys; sys.exit('no\\nmore')", "failed with SystemExit: no; name"),
        (r"raise ValueError('\x1b[2J')", r"failed with ValueError: .x1b\[2J; name"),
    ],
)
def test_what_cannot_be_brought_is_refused(tmp_path, content, words):
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(StudyError, match=words) as caught:
        bring([str(path)])
    assert str(caught.value).isprintable()


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
        seen = run["outcome"]["observed"]
        (name,) = (name for name in seen if name.startswith("largest_weight"))
        assert name.startswith("largest_weight@")
        (look,) = seen[name]
        assert look[0] == len(run["outcome"]["losses"])
        named = run["task"]["network"]
        assert ("@" in named["layers"]) == (named["name"] == "shallow")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Larger weights" in page
    assert f"--extend {mine}" in page
