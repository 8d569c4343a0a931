"""The engine: what is missing is done once, and neither a failure nor a kill costs what is done."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from study.small import Errand, Lonely, many_runs, small_data

from batchnorm.study.engine import complete
from batchnorm.study.store import Store
from batchnorm.study.tasks import StudyError, fingerprint
from batchnorm.study.training import Run

DATA = small_data()
CONSOLE = Console(file=io.StringIO())


def errands(*what):
    return [Errand("small", each) for each in what]


def test_a_task_is_done_once(tmp_path):
    a, b, c = errands("a", "b", "c")
    with Store(tmp_path) as store:
        complete([a, b, a], DATA, store, console=CONSOLE, jobs=1)
        complete([c, b, a], DATA, store, console=CONSOLE, jobs=1)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"]["what"] for line in lines] == ["a", "b", "c"]
    assert CONSOLE.file.getvalue() == ""  # no bars where nobody looks


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_that_fails_is_an_outcome_and_stops_no_other(tmp_path, jobs):
    tasks = [*errands("a", "fail", "b"), Lonely("small", "c"), Lonely("small", "fail")]
    with Store(tmp_path) as store:
        complete(tasks, DATA, store, console=CONSOLE, jobs=jobs)
        reasons = [store[task].reason for task in tasks]
        processes = [store[task].process for task in tasks]
    assert reasons == ["", "RuntimeError: as it was told", "", "", "RuntimeError: as it was told"]
    assert (processes[0] == os.getpid()) == (jobs == 1)
    assert processes[3] == os.getpid()  # what must be alone is, when the workers have gone


def test_a_lost_worker_is_said_in_one_line(tmp_path):
    a, deadly = errands("a", "die")
    with Store(tmp_path) as store:
        complete([a], DATA, store, console=CONSOLE, jobs=1)
        with pytest.raises(StudyError, match="a worker process was lost") as caught:
            complete([a, deadly], DATA, store, console=CONSOLE, jobs=2)
        assert a in store
    assert "\n" not in str(caught.value)


def test_progress_says_what_is_running(tmp_path):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    run = Run(fingerprint(DATA), "sigmoid", "plain", 1.0, 0, 1)
    with Store(tmp_path) as store:
        complete([*errands("a"), run], DATA, store, console=terminal, jobs=1)
    shown = terminal.file.getvalue()
    assert "sigmoid, plain, rate 1, seed 0" in shown
    assert "2/2" in shown


KILLED = """
import sys
from pathlib import Path
from rich.console import Console
from study.small import many_runs, small_data
from batchnorm.study.engine import complete
from batchnorm.study.store import Store

if __name__ == "__main__":
    with Store(Path(sys.argv[1])) as store:
        complete(many_runs(), small_data(), store, console=Console(), jobs=2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_study_goes_on_where_it_was(tmp_path):
    path = tmp_path / "results.jsonl"
    study = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.DEVNULL,
    )
    while study.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    study.kill()
    assert study.wait() == -signal.SIGKILL
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    runs = many_runs()
    assert 3 <= whole.count(b"\n") < len(runs)
    path.write_bytes(whole + before[:100])  # as a kill in the middle of a line would leave it
    with Store(tmp_path) as store:
        complete(runs, DATA, store, console=CONSOLE, jobs=1)
        assert all(len(store[run].losses) == 100 for run in runs)
    after = path.read_bytes()
    assert after.startswith(whole)
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert sorted(keys) == sorted(run.key for run in runs)
