"""Files that are whole, or not there."""

import csv
import json
from dataclasses import fields
from pathlib import Path

import pytest
from bench.small import made_up, rows_of, small_case

from batchnorm.bench.errors import BenchError
from batchnorm.bench.rows import Row
from batchnorm.bench.save import check_folder, save

ROWS = rows_of(made_up(small_case(), torch=1.0, native=0.5, mapped=0.25))


def test_the_files_are_whole(tmp_path):
    folder = tmp_path / "new" / "out"
    files = save(folder, ROWS, {"cpu": "a processor"}, b"a picture")
    assert files == [folder / "cpu.csv", folder / "cpu.json", folder / "cpu.png"]
    assert sorted(folder.iterdir()) == files
    with files[0].open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert list(found[0]) == [field.name for field in fields(Row)]
    assert [row["implementation"] for row in found] == ["torch.nn", "native", "native, mapped"]
    assert [float(row["ratio"]) for row in found] == [1, 2, 4]
    assert json.loads(files[1].read_text()) == {"cpu": "a processor"}
    assert files[2].read_bytes() == b"a picture"


def test_what_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, ROWS, {}, b"the first")
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:1])
        if content == b"the second":
            raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, ROWS[:1], {}, b"the second")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "out", ROWS, {"load": float("nan")}, b"")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_looked_at_before_and_not_made(tmp_path):
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="file is no folder; name another one"):
        check_folder(tmp_path / "file" / "a")
    if Path("/proc/self").exists():
        with pytest.raises(BenchError, match=r"--out /proc/bench: .*; name another folder"):
            check_folder(Path("/proc/bench"))
