"""Where outcomes are kept: one line each in one file, whole or not at all, and never made twice."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from batchnorm.study.tasks import FORMAT, Outcome, StudyError, Task

O = TypeVar("O", bound=Outcome)


class Store:
    """The outcomes in `results.jsonl`, by task.

    A line is written by one call, and is on the disk before its task counts as done. A last line
    without its end is what a kill leaves: it is cut off, and its task is done again.

    Args:
        folder: Where the file is, or is made.
        machine: What new outcomes are made on; it is written beside them.

    Raises:
        StudyError: Another study is at work here, or a line is not from a study.
    """

    def __init__(self, folder: Path, machine: str = "") -> None:
        self.path = folder / "results.jsonl"
        self._machine = machine
        self._lines: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise StudyError(f"{self.path}: {error.strerror}; name another folder") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, task: object) -> bool:
        assert isinstance(task, Task)
        return task.key in self._lines and task.answered_by(self[task])

    def __getitem__(self, task: Task[O]) -> O:
        return cast(O, task.outcome(**self._lines[task.key]["outcome"]))

    def machine(self, task: Task[Any]) -> str:
        """Return what the outcome of a task was made on."""
        return str(self._lines[task.key].get("machine", ""))

    def add(self, task: Task[Any], outcome: Outcome, machine: str = "") -> None:
        """Keep the outcome of a task, on the disk before this returns.

        Args:
            task: What was done.
            outcome: What came of it. It takes the place of an earlier one, and has what that had
                besides.
            machine: What it was made on; by default this machine.
        """
        if task.key in self._lines:
            outcome = outcome.joined(self[task])
        line = {
            "format": FORMAT,
            "kind": task.kind,
            "key": task.key,
            "machine": machine or self._machine,
            "task": task.declared(),
            "outcome": _rounded(asdict(outcome), task.digits),
        }
        text = json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
        # One write of an appending descriptor: a kill leaves the whole line, or a part at the end.
        encoded = text.encode()
        if os.write(self._file, encoded) < len(encoded):
            raise StudyError(f"{self.path}: the disk is full; make room and start again")
        os.fsync(self._file)
        self._lines[task.key] = json.loads(text)  # as it will be read, so that nothing differs then

    def close(self) -> None:
        """Let another study use the folder."""
        os.close(self._file)

    def _lock(self) -> None:
        """Keep others out, until the file is closed or this process ends, in whatever way."""
        try:
            import fcntl
        except ImportError:  # there is no such lock on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(
                f"{self.path}: another study is at work in this folder; wait, or name another one"
            ) from error

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, text in enumerate(content[:whole].splitlines(), start=1):
            line: Any = None
            with contextlib.suppress(ValueError):
                line = json.loads(text)
            if not _is_kept(line):
                raise StudyError(
                    f"{self.path}, line {number}: not an outcome of a study; "
                    "remove the line, or name another folder"
                )
            if line["format"] == FORMAT:
                self._lines[line["key"]] = line
        os.ftruncate(self._file, whole)


def _is_kept(line: Any) -> bool:
    """Tell whether this is what a study of any version writes."""
    types = {"format": int, "key": str, "outcome": dict}
    return isinstance(line, dict) and all(
        isinstance(line.get(name), expected) for name, expected in types.items()
    )


def _rounded(value: Any, digits: int) -> Any:
    """Round all floats in a JSON value to significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return value
