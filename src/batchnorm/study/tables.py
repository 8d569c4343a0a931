"""Tables: numbers in columns and a column of labels, in text files of comma-separated values."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TextIO

import numpy as np

from batchnorm.study.errors import DataError, wrong
from batchnorm.study.formats import Array, Part

_DELIMITERS = ",;\t"
_LABEL_NAMES = ("label", "class", "target", "y")  # the first that heads a column wins
_HEADS = _LABEL_NAMES[:3]  # beside numbers, `y` may be the label of a line: yes or no
_WAY_OUT = "correct it, or leave the line out"


@dataclass(frozen=True)
class _Columns:
    """What the first line says of all lines.

    Attributes:
        path: The file.
        line: The number of the first line.
        count: How many cells a line has.
        names: What heads them; empty without a header.
        label: Which of them is the label.
    """

    path: Path
    line: int
    count: int
    names: Sequence[str]
    label: int

    def wrong(self, line: int, column: int, got: str, expected: str) -> DataError:
        """Return the error that says this of one cell."""
        name = f" ({self.names[column]})" if self.names else ""
        return wrong(
            f"{self.path}, line {line}, column {column + 1}{name}", got, expected, _WAY_OUT
        )

    def values(self, line: int, cells: list[str]) -> list[float]:
        """Return the numbers of a line, without the label's cell."""
        if len(cells) != self.count:
            expected = f"{self.count}, as in line {self.line}"
            raise wrong(f"{self.path}, line {line}", f"{len(cells)} cells", expected, _WAY_OUT)
        if cells[self.label].lower() in ("", "nan"):
            raise self.wrong(line, self.label, "no value", "a label")
        try:
            return [float(cell) for cell in cells[: self.label] + cells[self.label + 1 :]]
        except ValueError:
            numbers = ((i, cell) for i, cell in enumerate(cells) if i != self.label)
            column, cell = next((i, cell) for i, cell in numbers if not _is_number(cell))
            got = f"'{cell[:50]}'" if cell else "no value"
            raise self.wrong(line, column, got, "a number") from None


def read_csv(path: Path) -> list[Part]:
    """Read inputs and labels, of training and of test together.

    Labels are integers if all are written as such, and text otherwise.
    """
    inputs, labels, lines = array("d"), list[str](), list[int]()
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = _rows(stream)
        first = next(rows, (1, []))
        columns = _columns(path, *first)
        for line, cells in rows if columns.names else chain([first], rows):
            inputs.extend(columns.values(line, cells))
            labels.append(cells[columns.label])
            lines.append(line)
    if not lines:
        raise wrong(path, "a header alone", "lines of numbers below it", "add the data")
    return [(path, _finite(columns, inputs, lines)), (path, _numbers_or_text(labels))]


def _rows(stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not blank."""
    first = stream.readline()
    while first and not first.strip():
        first = stream.readline()
    stream.seek(0)
    counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda mark: counts[mark])
    reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise csv.Error(f"{error}, line {reader.line_num}") from error


def _columns(path: Path, line: int, cells: list[str]) -> _Columns:
    if len(cells) < 2:
        expected = "two or more, with commas, semicolons or tabs between them"
        raise wrong(path, f"{len(cells)} columns", expected, "give numbers and a label")
    names = [cell.lower() for cell in cells]
    if any(map(_is_number, cells)) and not set(names) & set(_HEADS):
        return _Columns(path, line, len(cells), (), len(cells) - 1)
    columns = _Columns(path, line, len(cells), cells, len(cells) - 1)
    if "" in names:  # mostly the numbers of the rows, which may betray the labels
        got, way_out = "a column without a name", "name it, or write the file without its index"
        raise wrong(f"{path}, line {line}, column {names.index('') + 1}", got, "a name", way_out)
    for name in _LABEL_NAMES:
        if names.count(name) > 1:
            got = f"{names.count(name)} columns '{name}'"
            raise wrong(f"{path}, line {line}", got, "one", "name the others differently")
        if name in names:
            return replace(columns, label=names.index(name))
    return columns


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _finite(columns: _Columns, inputs: array[float], lines: Sequence[int]) -> Array:
    values = np.frombuffer(inputs).reshape(len(lines), -1)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        finite = np.isfinite(values.astype(np.float32))
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        got = str(values[row, column])
        column += column >= columns.label
        raise columns.wrong(lines[row], int(column), got, "a finite float32 value")
    return values


def _numbers_or_text(labels: Sequence[str]) -> Array:
    if all(label.isascii() and label.isdigit() for label in labels):
        return np.array([int(label) for label in labels])
    return np.array(labels)
