"""A whole bench: what is said, what is written, what is left when it is stopped."""

import importlib.util
import io
import json

import pytest
from rich.console import Console

from batchnorm.bench import conduct as module
from batchnorm.bench.cases import Wanted
from batchnorm.bench.conduct import conduct
from batchnorm.bench.contenders import PEERS
from batchnorm.bench.errors import BenchError
from batchnorm.environment import describe

SMALL = Wanted.parse("8x4", "float32", "forward", "1,2")


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(module, "copy_speed", lambda: 1e10)


def shown_by(*arguments, **options):
    console = Console(file=io.StringIO(), width=80)
    rows = conduct(*arguments, console=console, **options)
    return rows, console.file.getvalue()


def test_a_bench_from_end_to_end(tmp_path):
    rows, shown = shown_by(SMALL, tmp_path / "out", seconds=0)
    assert {row.threads for row in rows} == {1, 2}
    assert {row.implementation for row in rows} >= {"torch.nn"}
    assert "forward, float32, 2 threads" in shown
    assert "A large copy, bytes read and written: 10.0 GB/s on 1 thread, 10.0" in shown
    assert f"All rows: {tmp_path / 'out' / 'cpu.csv'}" in shown
    made_on = json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert made_on.items() >= describe().items()
    assert made_on["copy_gb_per_s"] == {n: {"start": 10.0, "end": 10.0} for n in "12"}
    assert made_on["seconds"] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["cpu.csv", "cpu.json", "cpu.png"]


def test_who_is_missing_is_left_out_aloud_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(PEERS["eager"], "missing", lambda: "it is on holiday", raising=False)
    wanted = Wanted.parse("8x4", "float32", "forward+backward", "1", "eager")
    with pytest.raises(BenchError, match="--peers eager: it is on holiday"):
        shown_by(wanted, tmp_path, seconds=0)
    for name in ("compile", "jax"):
        monkeypatch.setattr(PEERS[name], "missing", lambda: "so are they", raising=False)
    wanted = Wanted.parse("8x4", "float32", "forward+backward", "1")
    rows, shown = shown_by(wanted, tmp_path, seconds=0)
    assert "eager is left out: it is on holiday\n" in shown
    assert not {"eager", "torch.compile", "jax"} & {row.implementation for row in rows}
    left_out = json.loads((tmp_path / "cpu.json").read_text())["left_out"]
    assert left_out["torch.compile"] == "so are they"


@pytest.mark.parametrize("load", [0.2, 1e6])
def test_a_busy_machine_is_spoken_of(tmp_path, monkeypatch, load):
    monkeypatch.setattr(module, "_load", lambda: load)
    _, shown = shown_by(SMALL, tmp_path, seconds=0)
    assert ("This machine is busy: 1000000.0 processes" in shown) == (load > 1)


@pytest.mark.parametrize("stopped_in", ["measure", "terminal", "png", "save"])
def test_stopped_it_writes_nothing(tmp_path, monkeypatch, stopped_in):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, stopped_in, stop)
    with pytest.raises(KeyboardInterrupt):
        shown_by(SMALL, tmp_path / "new" / "out", seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_the_version_of_jax_is_written_or_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    shown_by(SMALL, tmp_path, seconds=0)
    assert json.loads((tmp_path / "cpu.json").read_text())["jax"] == "none"
