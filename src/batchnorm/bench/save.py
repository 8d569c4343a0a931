"""Writes what came of a bench: files that are whole, or not there."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from batchnorm.bench.errors import BenchError
from batchnorm.bench.rows import Row

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
    folder: Path, rows: Sequence[Row], made_on: Mapping[str, object], picture: bytes
) -> list[Path]:
    """Write the rows as CSV, what they were made on as JSON, and the picture.

    All are written under other names first, so that what is in the way of one leaves none.

    Args:
        folder: Where to; it is made if need be.
        rows: All that was measured.
        made_on: The hardware, the versions, the settings.
        picture: The content of a PNG file.

    Returns:
        The files.
    """
    contents = {
        f"{NAME}.csv": _csv(rows),
        f"{NAME}.json": (json.dumps(made_on, indent=2, allow_nan=False) + "\n").encode(),
        f"{NAME}.png": picture,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.part" for name in contents}
    try:
        for name, content in contents.items():
            partial[name].write_bytes(content)
        return [partial[name].replace(folder / name) for name in contents]
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue().encode()
