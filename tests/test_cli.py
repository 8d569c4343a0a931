"""The command line: exit statuses, one line for what is wrong, and no process left behind."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study.small import small_plan
from typer.testing import CliRunner

import batchnorm
from batchnorm import cli
from batchnorm.bench.check import BOUNDS
from batchnorm.study import conduct

RUNNER = CliRunner()


def test_env():
    shown = RUNNER.invoke(cli.app, ["env"])
    assert shown.exit_code == 0
    lines = [line.split(maxsplit=1) for line in shown.stdout.splitlines()]
    assert ["batchnorm", batchnorm.__version__] in lines
    assert ["kernels", "eager: ready"] in lines
    assert sum(name == "kernels" for name, _ in lines) == len(batchnorm.backends())


def test_help_has_every_verb():
    shown = RUNNER.invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    assert "study" in shown.stdout
    assert "bench" in shown.stdout
    assert "env" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--data", "digit"], "did you mean digits"),
        (["--data", "mnist:/no/where"], "no such path"),
        (["--data", "npz:{folder}/torn.npz"], "torn.npz"),
        (["--out", "{folder}/file"], "name another folder"),
        (["--out", "{folder}/foreign"], "line 1: not an outcome of a study"),
        (["--claims", "3,21"], "--claims 21: no such claim, expected numbers or names of 1, 2,"),
        (["--claims", "fewer_step"], "did you mean fewer_steps?"),
        (["--budget", "3"], "--budget 3: expected a time as 90s, 3m or 1h, or full"),
        (["--extend", "{folder}/none.py"], "none.py: importing it failed with FileNotFoundError"),
        (["--engine", "spark"], "spark"),
        (["--paper", "--claims", "3"], "leave --claims out"),
        (["compare", "{folder}", "{folder}/foreign"], "study.json"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(tmp_path, arguments, word):
    (tmp_path / "torn.npz").write_bytes(b"PK\3\4")
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.jsonl").write_text("a diary\n")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    shown = RUNNER.invoke(cli.app, ["study", "--out", str(tmp_path / "out"), *given])
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    assert shown.stderr.startswith("batchnorm: ")
    assert word in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "32"], "--shapes: got '32', expected examples x channels"),
        (["--dtypes", "float8"], "--dtypes: got 'float8', expected some of float32"),
        (["--modes", "training"], "--modes: got 'training', expected some of forward+backward"),
        (["--threads", "none"], "--threads: got 'none', expected 'all' or numbers"),
        (["--peers", "numpy"], "--peers: got 'numpy', expected some of torch.nn"),
        (["--out", "{folder}/file"], "file is no folder; name another one"),
    ],
)
def test_a_bench_that_cannot_be_gives_one_line_and_status_2(tmp_path, arguments, words):
    (tmp_path / "file").touch()
    given = [argument.format(folder=tmp_path) for argument in arguments]
    shown = RUNNER.invoke(cli.app, ["bench", "--out", str(tmp_path / "out"), *given])
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    assert shown.stderr.startswith("batchnorm: ")
    assert words in shown.stderr
    assert not (tmp_path / "out").exists()


def test_a_usage_error_has_status_2():
    assert RUNNER.invoke(cli.app, ["study", "--jobs", "0"]).exit_code == 2
    assert RUNNER.invoke(cli.app, ["bench", "--seconds", "-1"]).exit_code == 2
    assert RUNNER.invoke(cli.app, ["no-verb"]).exit_code == 2


def test_what_is_not_installed_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(sys, "argv", ["batchnorm", "study"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(cli.__file__)
    assert ended.value.code == 2
    said = 'batchnorm: typer is not installed: pip install "batchnorm[study]"\n'
    assert capsys.readouterr().err == said


def test_env_needs_nothing_but_the_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(sys, "argv", ["batchnorm", "env"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(cli.__file__)
    assert not ended.value.code
    assert "eager: ready" in capsys.readouterr().out


def test_what_is_not_installed_for_a_verb_is_said_too(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "batchnorm.study.conduct")
    monkeypatch.delitem(sys.modules, "batchnorm.study.engine")
    monkeypatch.setitem(sys.modules, "joblib", None)
    shown = RUNNER.invoke(cli.app, ["study", "--out", str(tmp_path)])
    assert shown.exit_code == 2
    assert shown.stderr == 'batchnorm: joblib is not installed: pip install "batchnorm[study]"\n'

    monkeypatch.delitem(sys.modules, "batchnorm.bench.conduct", raising=False)
    monkeypatch.delitem(sys.modules, "batchnorm.bench.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = RUNNER.invoke(cli.app, ["bench", "--out", str(tmp_path)])
    assert shown.exit_code == 2
    assert 'is not installed: pip install "batchnorm[bench]"\n' in shown.stderr


def test_a_bench_from_end_to_end(tmp_path):
    arguments = ["bench", "--shapes", "8x4", "--threads", "1", "--seconds", "0", "--modes"]
    shown = RUNNER.invoke(cli.app, [*arguments, "inference", "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "inference, bfloat16, 1 thread" in shown.stdout
    assert max(map(len, shown.stdout.splitlines()[:-1])) <= 80  # the last one is a path
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_wrong_result_is_no_bad_input(tmp_path, monkeypatch):
    monkeypatch.setitem(BOUNDS, "float32", {True: 0.0, False: 0.0})
    arguments = ["bench", "--shapes", "8x4", "--dtypes", "float32", "--out", str(tmp_path / "out")]
    shown = RUNNER.invoke(cli.app, [*arguments, "--quick"])
    assert shown.exit_code == 1
    assert "batchnorm: torch.nn is wrong: its y is off by" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_a_study_from_end_to_end(tmp_path, monkeypatch):
    def plan(data_set, networks):
        assert networks == []
        return small_plan(data_set)

    monkeypatch.setattr(conduct, "plan", plan)
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["study", "--claims", "1,agreement,20", "--jobs", "1", "--out", str(tmp_path)]
    shown = RUNNER.invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "What did batch normalization do on digits?" in shown.stdout
    assert "within" in shown.stdout  # the numbers of torch.nn
    assert max(map(len, shown.stdout.splitlines()[:-1])) <= 80  # the last one is a path
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "batchnorm study --data digits --claims 1 --budget full --out study-1" in page
    whole = f"--data digits --claims 1,agreement,20 --budget 3m --out {tmp_path}"
    assert f"batchnorm study {whole}" in page
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {
        *("effects.csv", "figures", "report.html", "report.md", "results.csv", "results.jsonl"),
        "study.json",
    }
    lines = (tmp_path / "results.jsonl").read_bytes()
    kinds = {json.loads(line)["kind"] for line in lines.splitlines()}
    assert {"run", "pace"} < kinds

    again = RUNNER.invoke(cli.app, arguments)
    assert again.exit_code == 0
    assert again.stdout == shown.stdout
    assert (tmp_path / "results.jsonl").read_bytes() == lines

    folders = [str(tmp_path), str(tmp_path)]
    page = tmp_path / "compare.html"
    beside = RUNNER.invoke(cli.app, ["study", "compare", *folders, "--out", str(page)])
    assert beside.exit_code == 0, beside.output
    assert page.exists()


def test_what_there_is_no_time_for_is_said(tmp_path):
    arguments = ["study", "--claims", "1,20", "--budget", "26s", "--jobs", "1"]
    shown = RUNNER.invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "not measured" in shown.stdout
    assert "left out" in (tmp_path / "report.md").read_text()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert "run" not in kinds


@pytest.mark.parametrize(
    ("options", "missing", "extra"),
    [(["--engine", "dask"], "distributed", "dask"), (["--engine", "ray"], "ray", "ray")],
)
def test_an_engine_that_is_not_installed_is_said(tmp_path, monkeypatch, options, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = ["study", "--claims", "20", "--out", str(tmp_path), *options]
    shown = RUNNER.invoke(cli.app, arguments)
    assert shown.exit_code == 2
    assert shown.stderr.endswith(f'is not installed: pip install "batchnorm[{extra}]"\n')


#: What is started in the background, as by nohup, would not hear a Ctrl-C.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(tmp_path):
    path = tmp_path / "results.jsonl"
    program = f"{LISTENING}from batchnorm.cli import main; main()"
    command = [sys.executable, "-c", program, "study", "--jobs", "2", "--out", str(tmp_path)]
    study = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def at_work():  # a run is kept, by the study and two workers that have all started
        kept = path.exists() and path.read_bytes().count(b'"kind":"run"') >= 1
        return kept and len(processes(study.pid)) >= 3

    while study.poll() is None and not at_work():
        time.sleep(0.01)
    os.killpg(study.pid, signal.SIGINT)  # as a terminal does: to all of them
    output, error = study.communicate()
    assert study.returncode == 130
    assert output == ""
    assert error == (
        "batchnorm: stopped; what is finished is kept: run the same command again to go on\n"
    )
    deadline = time.monotonic() + 20
    while (left := processes(study.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert {json.loads(line)["kind"] for line in path.read_text().splitlines()} >= {"pace", "run"}


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_nothing_of_a_bench(tmp_path):
    program = f"""{LISTENING}
from batchnorm.bench import conduct
from batchnorm.cli import main

copy_speed = conduct.copy_speed
conduct.copy_speed = lambda: print("at work", flush=True) or copy_speed()
main()
"""
    options = ["--shapes", "64x32", "--seconds", "60", "--peers", "eager", "--out"]
    command = [sys.executable, "-c", program, "bench", *options, str(tmp_path / "out")]
    bench = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for line in bench.stdout:
        if line == "at work\n":
            break
    time.sleep(2)  # on its way to its first case, or in it for a minute
    os.killpg(bench.pid, signal.SIGINT)
    output, error = bench.communicate()
    assert bench.returncode == 130
    assert error == "batchnorm: stopped; nothing is written\n"
    assert "All rows" not in output
    assert list(tmp_path.iterdir()) == []


def processes(session):
    """Return the processes of a session that still run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *numbers = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(numbers[2]) == session and state != "Z":
            found.append(file.parent.name)
    return found
