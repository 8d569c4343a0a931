"""TensorBoard event files, so that running training can be watched; without a folder, nothing."""

from __future__ import annotations

import hashlib
import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from batchnorm.study.tasks import StudyError

_SECONDS = 1  # what is added is in the file after so long
_BYTES = 200  # of a folder's name: systems allow 255

_folder: ContextVar[Path | None] = ContextVar("_folder", default=None)


class Writer:
    """Takes the values of a training; that they cannot be written stops nothing.

    Args:
        files: TensorBoard's writer, or None to let the values go.
        place: The folder of its files.
    """

    def __init__(self, files: Any = None, place: Path = Path()) -> None:
        self._files, self._place = files, place

    def add(self, step: int, **values: float) -> None:
        """Add the values of a step, each under its name."""
        if self._files is not None:
            with _spared(self._place):
                for name, value in values.items():
                    self._files.add_scalar(name, value, step)


def check(folder: Path) -> None:
    """Find out whether event files can be written, and make their folder.

    Args:
        folder: Where they are to go.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        StudyError: There can be no such folder.

    Example:
        >>> import tempfile
        >>> check(Path(tempfile.mkdtemp()) / "events")
    """
    importlib.import_module("torch.utils.tensorboard")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{folder}: {error.strerror}; name another folder") from error


@contextmanager
def into(folder: Path | None) -> Iterator[None]:
    """Let what is written inside go to a folder.

    Args:
        folder: What TensorBoard's `--logdir` is to be; None for no files.
    """
    before = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(before)


@contextmanager
def writer(name: str) -> Iterator[Writer]:
    """Give what takes the values of one training, and writes them if a folder is wanted.

    Files that an earlier training of this name has left are removed. Where files cannot be
    written, there is a warning, and the training goes on.

    Args:
        name: What TensorBoard calls it.

    Yields:
        The writer.

    Raises:
        ModuleNotFoundError: A folder is wanted, and TensorBoard is not installed.

    Example:
        >>> with writer("a network") as written:
        ...     written.add(1, loss=2.5)
    """
    folder = _folder.get()
    if folder is None:
        yield Writer()
        return
    from torch.utils.tensorboard import SummaryWriter

    place = folder / _safe(name)
    files = None
    with _spared(place):
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        files = SummaryWriter(place, flush_secs=_SECONDS)
    try:
        yield Writer(files, place)
    finally:
        if files is not None:
            with _spared(place):
                files.close()


@contextmanager
def _spared(place: Path) -> Iterator[None]:
    """Let nothing that is wrong with the files end what is worth more than they are."""
    try:
        yield
    except OSError as error:
        _warn(place.parent, error.strerror or type(error).__name__)


@cache
def _warn(folder: Path, why: str) -> None:
    """Warn once in a process, as every step of every training would say the same."""
    warnings.warn(f"{folder}: event files cannot be written: {why}", stacklevel=2)


def _safe(name: str) -> str:
    """Turn a name into one of a folder, on any system; names that differ stay different."""
    safe = re.sub(r"[^\w ,.=+-]", "_", name).strip(" .")
    if safe == name and 0 < len(name.encode()) <= _BYTES:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{safe.encode()[:_BYTES].decode(errors='ignore')} {digest}".strip()
