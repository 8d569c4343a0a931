"""What the commands for models show: tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.study.errors import printable

if TYPE_CHECKING:
    from batchnorm.models.fold import FoldReport
    from batchnorm.models.programs.moved import ProgramReport


def folded(report: FoldReport, error: float) -> RenderableType:
    """Return what was folded into what, what was left and why, and how large the error is.

    Args:
        report: What folding says.
        error: The largest error of what is in the file, read again.
    """
    rows = [
        (name or "itself", ", ".join(_beside(name, other) for other in into))
        for name, into in report.folded.items()
    ]
    verdict = "verified" if report.tol is not None and error <= report.tol else "differs"
    return Group(
        _table(("batch norm", "folded into"), rows, "ll"),
        _left(report.left),
        _line(
            f"{len(report.folded)} folded, {len(report.left)} left; {verdict}: largest error "
            f"{error:.1e}, allowed {report.tol:.1e}"
        ),
    )


def calibrated(report: ProgramReport) -> RenderableType:
    """Return what calibrating moved, layer by layer, and what was left."""
    rows = [
        (
            name or "itself",
            f"{moved.values:,}",
            " → ".join(f"{value:.3g}" for value in moved.mean),
            " → ".join(f"{value:.3g}" for value in moved.var),
            f"{moved.change:.1%}" if moved.change < 10 else f"{moved.change:.3g}×",
        )
        for name, moved in report.moved.items()
    ]
    batches = f"{report.batches} batch{'es' if report.batches != 1 else ''}"
    unused = f"; the last {report.unused} examples make no batch" if report.unused else ""
    return Group(
        _table(("batch norm", "values", "mean", "variance", "change"), rows, "lrrrr"),
        _left(report.left),
        _line(f"{len(report.done)} calibrated, {len(report.left)} left; {batches}{unused}"),
        _line(
            "values: a channel. mean, variance: averages over the channels. change: the largest of "
            "a channel, of its mean in standard deviations or of its variance."
        ),
    )


def _beside(name: str, other: str) -> str:
    """Return what a layer is called beside another one: `.convolution`, say."""
    parent = name.rpartition(".")[0]
    return other.removeprefix(parent) if parent and other.startswith(f"{parent}.") else other


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> RenderableType:
    """Return rows below their titles; none if there are none."""
    if not rows:
        return Text("", end="")
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title, side in zip(titles, sides, strict=True):
        right = side == "r"
        grid.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    return grid


def _left(left: Mapping[str, str]) -> RenderableType:
    return _table(("left", "because"), [(n or "itself", why) for n, why in left.items()], "ll")


def _line(text: str) -> RenderableType:
    return Text(printable(text))
