"""What the commands for model files have together."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from batchnorm.cli.ending import ended_in_one_line

NOTHING = "nothing is written"
RUNS = "the model cannot be run here; check that it was exported for the CPU"

Source = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A .pt2 file of torch.export.save, or an .onnx file."),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="The new file, of the same kind; written whole, or not.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Examples in a call, where the model takes any number.")
]


@contextmanager
def command(kept: str) -> Iterator[None]:
    """End what goes wrong in one line, and leave out what torch warns itself of.

    Args:
        kept: What Ctrl-C leaves.
    """
    with ended_in_one_line("export", kept), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal what is at work."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def say_written(out: Path) -> None:
    """Say where a file is now."""
    Console().print(f"Written: {out}", markup=False, soft_wrap=True, highlight=False)
