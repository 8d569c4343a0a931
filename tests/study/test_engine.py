"""The engine: what is missing is done once, and neither a failure nor a kill costs what is done."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from study.errands import Asking, Errand, Lonely
from study.small import many_runs, small_data

from batchnorm.study.engine import ENGINES, complete
from batchnorm.study.store import Store
from batchnorm.study.tasks import StudyError

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


def test_equal_tasks_are_done_as_one_that_answers_both(tmp_path):
    first, second, third = (Asking("small", "a", asked=frozenset({x})) for x in (1.0, 2.0, 3.0))
    with Store(tmp_path) as store:
        complete([first, second, first], DATA, store, console=CONSOLE, jobs=1)
        assert store[first].values == [1, 2]
        complete([second], DATA, store, console=CONSOLE, jobs=1)
        complete([third, first], DATA, store, console=CONSOLE, jobs=1)
        assert store[first].values == [1, 3]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_with_one_job_all_is_done_in_this_process_and_what_is_alone_last(tmp_path):
    lonely = [Lonely("small", "c"), Lonely("small", "fail")]
    others = errands("a", "fail", "b")
    with Store(tmp_path) as store:
        complete([*lonely, *others], DATA, store, console=CONSOLE, jobs=1)
        reasons = [store[task].reason for task in (*others, *lonely)]
        assert {store[task].process for task in (*others, *lonely)} == {os.getpid(), 0}
    assert reasons == ["", "RuntimeError: as it was told", "", "", "RuntimeError: as it was told"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["errand"] * 3 + ["lonely errand"] * 2


@pytest.mark.parametrize("culprits", [set(), {0}, {19}, {3, 4, 11}, set(range(20))])
def test_tasks_that_lose_their_process_are_found_and_all_others_done(
    tmp_path, monkeypatch, culprits
):
    names = [str(number) for number in range(20)]
    rounds = []

    @contextmanager
    def fragile(jobs, address, shared):
        def together(calls):
            rounds.append(calls)
            numbers = [args[0] for _, args, _ in calls]
            begun = []
            for function, args, kwargs in calls:
                begun.append(args[0])
                if function.__name__ == "work" and culprits & {*begun}:
                    break
                yield function(*args, **kwargs)
                begun.pop()
            else:
                return
            begun += numbers[numbers.index(begun[-1]) + 1 :][:3]  # others were under way as well
            for number in begun:
                yield number, None

        yield together

    monkeypatch.setitem(ENGINES, "joblib", fragile)
    tasks = errands(*names)
    with Store(tmp_path, machine="this one") as store:
        complete(tasks, DATA, store, console=CONSOLE)
        lost = {number for number, task in enumerate(tasks) if store[task].reason}
        assert lost == culprits
        assert {store[tasks[number]].reason for number in culprits} <= {
            "the process that ran it was lost, perhaps for want of memory"
        }
    assert len(rounds) <= 1 + 7 * len(culprits)


@pytest.mark.parametrize("heard", [0, 1, 9])
def test_an_engine_that_can_do_nothing_is_no_outcome(tmp_path, monkeypatch, heard):
    @contextmanager
    def useless(jobs, address, shared):
        yield lambda calls: [(args[0], None) for _, args, _ in calls][:heard]

    monkeypatch.setitem(ENGINES, "joblib", useless)
    message = "every worker is lost, whatever it does"
    with Store(tmp_path) as store, pytest.raises(StudyError, match=message):
        complete(errands("a", "b"), DATA, store, console=CONSOLE)
    assert (tmp_path / "results.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"engine": "other"}, "other: no such engine; name one of joblib, dask, ray"),
        ({"address": "tcp://a:1"}, "tcp://a:1: joblib works on this machine; name the engine"),
        ({"engine": "dask", "address": "tcp://127.0.0.1:1"}, "tcp://127.0.0.1:1: nothing answers"),
        ({"engine": "dask", "address": "nonsense"}, "nonsense: not an address; give it as tcp"),
    ],
)
def test_an_engine_that_cannot_be_is_said_in_one_line(tmp_path, choice, message):
    with Store(tmp_path) as store, pytest.raises(StudyError) as caught:
        complete(errands("a"), DATA, store, console=CONSOLE, **choice)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch, engine):
    library = {"dask": "distributed"}.get(engine, engine)
    monkeypatch.setitem(sys.modules, library, None)
    with Store(tmp_path) as store, pytest.raises(ModuleNotFoundError) as caught:
        complete(errands("a"), DATA, store, console=CONSOLE, engine=engine)
    assert caught.value.name == library


def test_event_files_are_written_where_they_are_wanted(tmp_path):
    tasks = [Errand("small", "write"), Lonely("small", "write alone")]
    with Store(tmp_path) as store:
        complete(tasks, DATA, store, console=CONSOLE, jobs=1, events=tmp_path / "events")
        assert not any(store[task].reason for task in tasks)
    assert {path.name for path in (tmp_path / "events").iterdir()} == {"write", "write alone"}
    assert len([*(tmp_path / "events").glob("*/events.out.tfevents.*")]) == 2


def test_a_folder_for_event_files_that_cannot_be_stops_before_any_task(tmp_path):
    (tmp_path / "file").touch()
    with Store(tmp_path) as store, pytest.raises(StudyError, match="name another folder"):
        complete(errands("a"), DATA, store, console=CONSOLE, jobs=1, events=tmp_path / "file")
    assert (tmp_path / "results.jsonl").read_text() == ""


def test_progress_says_what_is_running(tmp_path):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Store(tmp_path) as store:
        tasks = [*errands("one errand", "net[/b]\a"), Lonely("small", "a lonely one")]
        complete(tasks, DATA, store, console=terminal, jobs=1)
    shown = terminal.file.getvalue()
    assert "one errand" in shown
    assert "net[/b]\\x07" in shown
    assert "a lonely one" in shown
    assert "3/3" in shown


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
    workers = psutil.Process(study.pid).children(recursive=True)
    assert len(workers) >= 2
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
    _, left = psutil.wait_procs(workers, timeout=20)  # they notice within a second
    assert not left
