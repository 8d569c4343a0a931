"""Event files: where they are asked for they are there at once, and elsewhere there is nothing."""

import builtins
import errno
import math
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils.tensorboard import SummaryWriter

from batchnorm.study import events


def read(folder):
    """The values in the event files of a folder, as (step, name, value)."""
    return [
        (event.step, value.tag, value.simple_value)
        for path in sorted(folder.glob("events.out.tfevents.*"))
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def write(folder, name):
    with events.into(folder), events.writer(name) as writer:
        writer.add(1, loss=1.0)
        return "written"


def test_without_a_folder_nothing_is_written_or_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import would fail
    with events.into(None), events.writer("a") as writer:
        writer.add(1, loss=2.5)
    assert list(tmp_path.iterdir()) == []


def test_values_come_back(tmp_path):
    with events.into(tmp_path), events.writer("conv, rate 0.1") as writer:
        writer.add(1, loss=2.5, accuracy=0.125)
        writer.add(2, loss=math.inf)
    assert read(tmp_path / "conv, rate 0.1") == [
        (1, "loss", 2.5),
        (1, "accuracy", 0.125),
        (2, "loss", math.inf),
    ]


def test_running_training_can_be_watched(tmp_path):
    with events.into(tmp_path), events.writer("a") as writer:
        writer.add(1, loss=2.5)
        end = time.monotonic() + 20
        while not read(tmp_path / "a") and time.monotonic() < end:
            time.sleep(0.1)
        assert read(tmp_path / "a") == [(1, "loss", 2.5)]


def test_a_second_run_replaces_the_first_and_no_other(tmp_path):
    for loss in (1.0, 2.0):
        with events.into(tmp_path):
            for name in ("a", "a b"):
                with events.writer(name) as writer:
                    writer.add(1, loss=loss)
    with events.into(tmp_path), events.writer("a") as writer:
        writer.add(1, loss=3.0)
    assert read(tmp_path / "a") == [(1, "loss", 3.0)]
    assert read(tmp_path / "a b") == [(1, "loss", 2.0)]


def test_a_writer_is_closed_and_the_folder_forgotten_after_a_failure(tmp_path):
    def fail():
        with events.into(tmp_path), events.writer("a") as writer:
            writer.add(1, loss=1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert read(tmp_path / "a") == [(1, "loss", 1.0)]
    with events.writer("b"):
        pass
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "/etc", "..", "", ".", "a:b\\c", "x" * 400, "é" * 150, "\ud800"]
)
def test_every_name_stays_in_the_folder(tmp_path, name):
    folder = tmp_path / "folder"
    with events.into(folder), events.writer(name) as writer:
        writer.add(1, loss=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (inside,) = folder.iterdir()
    assert read(inside) == [(1, "loss", 1.0)]


@pytest.mark.parametrize("names", [("é" * 150 + "1", "é" * 150 + "2"), ("a/b", "a:b"), ("", "_")])
def test_names_that_differ_have_folders_of_their_own(tmp_path, names):
    for name in names:
        write(tmp_path, name)
    assert len([*tmp_path.iterdir()]) == 2


def test_files_that_cannot_be_made_stop_nothing_and_are_told_of_once(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    with pytest.warns(UserWarning, match="event files cannot be written: .") as told:
        assert [write(tmp_path, name) for name in ("a", "b")] == ["written"] * 2
    assert len(told) == 1


@pytest.mark.parametrize("method", ["add_scalar", "close"])
def test_a_disk_that_is_full_later_stops_nothing(tmp_path, monkeypatch, method):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, method, full)
    with pytest.warns(UserWarning, match="No space left on device") as told:
        assert [write(tmp_path, name) for name in ("a", "b")] == ["written"] * 2
    assert len(told) == 1


def test_missing_tensorboard_is_noticed(tmp_path, monkeypatch):
    events.check(tmp_path / "events")
    assert (tmp_path / "events").is_dir()
    for name in [name for name in sys.modules if "tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError) as caught:
        events.check(tmp_path)
    assert caught.value.name == "tensorboard"
