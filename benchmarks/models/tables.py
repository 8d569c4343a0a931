"""The rows in short: for a terminal of 80 columns, for README.md, and for the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.bench.tables import digits
from benchmarks.models.figures import LAYOUTS, figures
from benchmarks.models.rows import Row
from benchmarks.models.ways import (
    ACCELERATED,
    COMPILED,
    CONVERTED,
    FOLDED,
    MODES,
    REORDERED,
    SAVING,
    STOCK,
    TRAINING,
)

#: The ways that have a column of their own, and what stands above it where there is no room.
_SHOWN = {
    CONVERTED.name: "convert",
    ACCELERATED.name: "accel.",
    SAVING.name: "save",
    FOLDED.name: "fold",
    COMPILED.name: "compile",
}

Cells = list[list[str]]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of all networks, and the figures: for README.md."""
    return f"{_markdown(_speeds(rows), left=3)}\n\n{figures_in_markdown(rows)}"


def details(rows: Sequence[Row]) -> str:
    """Return the figures, and what each way keeps and how exact it is: for the documentation."""
    return f"{figures_in_markdown(rows)}\n\n{_markdown(_exactness(rows), left=3)}"


def figures_in_markdown(rows: Sequence[Row]) -> str:
    """Return the table of the figures."""
    return _markdown(_figures(rows), left=1)


def terminal(rows: Sequence[Row]) -> RenderableType:
    """Return the tables for a terminal: the speeds, in both modes, and the figures."""
    speeds = _speeds(rows)
    parts: list[RenderableType] = []
    for mode in MODES:
        own = [line for line in speeds[1:] if line[2] == mode]
        if own:
            used = [i for i in range(len(speeds[0])) if i != 2 and any(line[i] for line in own)]
            heading = [_SHOWN.get(speeds[0][i].strip("`"), speeds[0][i]) for i in used]
            parts += [
                Text(mode, style="bold"),
                _rich([heading, *([x[i] for i in used] for x in own)], 2),
            ]
    if len(_figures(rows)) > 1:
        parts.append(_rich(_figures(rows), 1))
    return Group(*parts, Text(_LEGEND, style="dim"))


_LEGEND = (
    "Times the speed of the model as it is (stock). kept: what autograd keeps, with save_memory, "
    "as a part of what it keeps in the model as it is; peak: likewise, of a step. apart: the "
    "largest relative difference of the losses, accelerated; in brackets that which rounding "
    "makes, the images being in another order."
)


def _speeds(rows: Sequence[Row]) -> Cells:
    """Return the table of the times: a line a network, layout and mode."""
    names = [name for name in _SHOWN if any(row.way == name for row in rows)]
    cells = [["network", "layout", "mode", "stock, ms", *(f"`{n}`" for n in names),
              "kept", "peak", "apart"]]  # fmt: skip
    for found in _grouped(rows):
        stock, saving = found[STOCK.name], found.get(SAVING.name)
        kept = saving.kept_ratio if saving is not None else None
        peak = saving.peak_ratio if saving is not None else None
        speeds = (f"{digits(found[n].ratio)}x" if n in found else "" for n in names)
        cells.append(
            [stock.network, stock.layout, stock.mode, digits(stock.median_ms), *speeds,
             _part(kept), _part(peak),
             _apart(found)]
        )  # fmt: skip
    return cells


def _exactness(rows: Sequence[Row]) -> Cells:
    """Return the table of memory and errors: a line a network, layout, mode and way."""
    cells = [["network", "layout", "way", "kept, MB", "peak, MB", "error", "loss", "losses apart",
              "in float64"]]  # fmt: skip
    for found in _grouped(rows):
        for row in found.values():
            if row.mode == TRAINING:
                numbers = (row.error, row.loss_error, row.losses_apart, row.losses_apart_float64)
                cells.append(
                    [row.network, row.layout, f"`{row.way}`", _megabytes(row.kept_mb),
                     _megabytes(row.peak_mb), *(_scientific(number) for number in numbers)]
                )  # fmt: skip
    return cells


def _figures(rows: Sequence[Row]) -> Cells:
    layouts = [layout for layout in LAYOUTS if any(row.layout == layout for row in rows)]
    heading = [f"{rows[0].network}, batch {rows[0].batch}, {rows[0].image}x{rows[0].image}"]
    cells = [[*heading, *layouts, "required", "aim"]]
    for figure in figures(rows):
        measured = [figure.values.get(layout, "") for layout in layouts]
        cells.append([figure.name, *measured, figure.required, figure.aim])
    return cells


def _grouped(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Return the rows of each network, layout and mode, by the ways."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.layout, row.mode), {})[row.way] = row
    return list(groups.values())


def _apart(found: dict[str, Row]) -> str:
    own, rounding = found.get(ACCELERATED.name), found.get(REORDERED.name)
    if own is None or rounding is None:
        return ""
    return f"{_scientific(own.losses_apart)} ({_scientific(rounding.losses_apart)})"


def _part(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}" if value else "0"


def _markdown(cells: Cells, left: int) -> str:
    marks = ["---"] * left + ["---:"] * (len(cells[0]) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], marks, *cells[1:]))


def _rich(cells: Cells, left: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for at, heading in enumerate(cells[0]):
        table.add_column(heading, justify="left" if at < left else "right")
    for line in cells[1:]:
        table.add_row(*(cell.replace("`", "") for cell in line))
    return table
