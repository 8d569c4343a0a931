"""The answer in one table, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from batchnorm.study.errors import printable
from batchnorm.study.story import COLUMNS, LEGEND, Story, heading, lines

_WIDTHS = (20, 12, 12, 28)  # with what stands between and before them, 80
_VERDICTS = {"holds": "green", "does not hold": "red", "depends": "yellow"}


def terminal(story: Story) -> RenderableType:
    """Return the table for a terminal of 80 columns.

    Args:
        story: What came of the study.

    Returns:
        What Rich prints.
    """
    parts = [title(story.question), columns([("", *COLUMNS)], _WIDTHS, "rrl", "dim")]
    for judgement in story.judgements:
        claim = judgement.claim
        parts += [
            verdict(heading(claim.number, claim.title), judgement.answer, claim.unit),
            columns(lines(judgement.findings), _WIDTHS, "rrl"),
        ]
    parts += [Text(""), Text(" ".join(filter(None, (LEGEND, story.left_out))), style="dim")]
    return Group(*parts)


def title(text: str) -> RenderableType:
    """Return a line above everything."""
    return Text(printable(text), style="bold", justify="center")


def verdict(claim: str, answer: str, unit: str = "") -> RenderableType:
    """Return a claim's own line: what it says, what its numbers are, and whether it holds."""
    head = Table.grid(padding=(0, 2), pad_edge=False)
    head.add_column(width=63, overflow="fold")
    head.add_column(width=15, justify="right")
    told = Text.assemble(
        (printable(claim), "bold"), (f"  {printable(unit)}" if unit else "", "dim")
    )
    head.add_row(told, Text(answer, style=f"bold {_VERDICTS.get(answer, 'dim')}"))
    return Padding(head, (1, 0, 0, 0))


def columns(
    cells: Iterable[Sequence[str]], widths: Sequence[int], sides: str, style: str = ""
) -> RenderableType:
    """Return rows whose columns stand below those of other rows.

    Args:
        cells: The rows.
        widths: How wide each column is.
        sides: Whether each column but the first stands to the left (`l`) or to the right (`r`).
        style: How they look.
    """
    grid = Table.grid(padding=(0, 2), pad_edge=False)
    for width, side in zip(widths, "l" + sides, strict=True):
        grid.add_column(width=width, overflow="fold", justify="left" if side == "l" else "right")
    for row in cells:
        grid.add_row(*(Text(printable(cell), style=style) for cell in row))
    return Padding(grid, (0, 0, 0, 2))
