"""TensorBoard event files, so that running training can be watched; without a folder, nothing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from batchnorm.study.tasks import StudyError

_SECONDS = 1  # what is added is in the file after so long

_folder: ContextVar[Path | None] = ContextVar("_folder", default=None)


class Writer:
    """Takes the values of a training.

    Args:
        writer: TensorBoard's, or None to let the values go.
    """

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def add(self, step: int, **values: float) -> None:
        """Add the values of a step, each under its name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)


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

    Files that an earlier training of this name has left are removed.

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
    for old in place.glob("events.out.tfevents.*"):
        old.unlink()
    with closing(SummaryWriter(place, flush_secs=_SECONDS)) as files:
        yield Writer(files)


def _safe(name: str) -> str:
    """Turn a name into one of a folder, on any system."""
    return re.sub(r"[^\w ,.=+-]", "_", name)[:200].strip(" .") or "_"
