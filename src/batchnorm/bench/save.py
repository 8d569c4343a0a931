"""Writes what came of a bench: files that are whole, or not there."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from batchnorm.bench.errors import BenchError

NAME = "cpu"  # where it was measured


def check_folder(folder: Path) -> None:
    """Raise unless files can be written to a folder, which need not be there yet.

    Raises:
        BenchError: They cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise BenchError(f"--out {folder}: {there} is no folder; name another one")
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise BenchError(f"--out {folder}: {error.strerror}; name another folder") from error


def save(
    folder: Path,
    rows: Sequence[Any],
    made_on: Mapping[str, object],
    picture: bytes,
    name: str = NAME,
) -> list[Path]:
    """Write the rows as CSV, what they were made on as JSON, and the picture.

    All are written under other names first, so that what is in the way of one leaves none.

    Args:
        folder: Where to; it is made if need be.
        rows: All that was measured, of one dataclass, whose attributes are the columns.
        made_on: The hardware, the versions, the settings.
        picture: The content of a PNG file.
        name: What the files are called, but for their ending.

    Returns:
        The files.
    """
    contents = {
        f"{name}.csv": _csv(rows),
        f"{name}.json": (json.dumps(made_on, indent=2, allow_nan=False) + "\n").encode(),
        f"{name}.png": picture,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = {file: folder / f".{file}.part" for file in contents}
    try:
        for file, content in contents.items():
            partial[file].write_bytes(content)
        return [partial[file].replace(folder / file) for file in contents]
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def put(path: Path, begin: str, text: str, end: str) -> None:
    """Put a text between two marks in a file, in the place of what is there.

    Args:
        path: The file; it stays as it is where it has no such marks.
        begin: The first mark.
        text: What comes between.
        end: The last mark.
    """
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    before = path.read_text(encoding="utf-8")
    whole = pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", before)
    path.write_text(whole, encoding="utf-8")


def _csv(rows: Sequence[Any]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(rows[0])])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue().encode()
