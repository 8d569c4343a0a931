"""What was measured of whole models, as tables and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.models.measure import Row
from benchmarks.models.ways import (
    ACCELERATED,
    FOLDED,
    INFERENCE,
    REORDERED,
    SAVING,
    STOCK,
    TRAINING,
)


def markdown(rows: Sequence[Row]) -> str:
    """Return the tables of README.md: the speed of each way, and the memory and losses of training.

    Args:
        rows: All that was measured.
    """
    names = _names(rows)
    speeds = _head(["model", "mode", "stock, ms", *names])
    for network, layout, mode in _groups(rows):
        own = {r.way: r for r in rows if (r.network, r.layout, r.mode) == (network, layout, mode)}
        cells = [f"{own[name].ratio:.2f}x" if name in own else "" for name in names]
        stock = f"{own[STOCK.name].median_ms:.0f}"
        speeds.append(_line([f"{network}, {layout}", mode, stock, *cells]))
    memory = _head(["model", "way", "kept", "peak", "losses apart"])
    for row in rows:
        if row.mode == TRAINING and row.way != STOCK.name:
            known = [f"{v:.2f}" if v is not None else "" for v in (row.kept, row.peak)]
            memory.append(
                _line([f"{row.network}, {row.layout}", row.way, *known, f"{row.apart:.0e}"])
            )
    return "\n".join([*speeds, "", *memory])


def figures(rows: Sequence[Row]) -> str:
    """Return the table of what was to be reached, and was.

    Args:
        rows: All that was measured; the first network counts.
    """
    first = rows[0].network
    layouts = [
        layout for network, layout, mode in _groups(rows) if (network, mode) == (first, TRAINING)
    ]
    by_key = {(r.layout, r.mode, r.way): r for r in rows if r.network == first}
    lines = _head(["", "must be", "aim", *layouts])
    for what, must, aim, mode, way, show in (
        ("training step, accelerated", "1.25x", "1.4x", TRAINING, ACCELERATED, _speed),
        ("kept activations with `save_memory`", "0.65", "0.55", TRAINING, SAVING, _kept),
        ("training step with `save_memory`", "1x", "1.2x", TRAINING, SAVING, _speed),
        ("inference, folded", "1.2x", "1.3x", INFERENCE, FOLDED, _speed),
        ("losses apart, accelerated", "as reordered", "", TRAINING, ACCELERATED, _apart),
        ("losses apart, stock, reordered", "", "", TRAINING, REORDERED, _apart),
        ("losses of two steps apart, float64", "rounding", "", TRAINING, ACCELERATED, _exact),
    ):  # fmt: skip
        found = [by_key.get((layout, mode, way.name)) for layout in layouts]
        lines.append(_line([what, must, aim, *("" if row is None else show(row) for row in found)]))
    return "\n".join(lines)


def _speed(row: Row) -> str:
    return f"{row.ratio:.2f}x ({row.ratio_q25:.2f} to {row.ratio_q75:.2f})"


def _kept(row: Row) -> str:
    return f"{row.kept:.2f}"


def _apart(row: Row) -> str:
    return f"{row.apart:.0e}"


def _exact(row: Row) -> str:
    return f"{row.exact:.0e}"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _groups(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((row.network, row.layout, row.mode) for row in rows))


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the ways that are compared with the model as it is."""
    alike = (STOCK.name, REORDERED.name)
    return [name for name in dict.fromkeys(row.way for row in rows) if name not in alike]


def png(rows: Sequence[Row]) -> bytes:
    """Draw the speeds.

    Args:
        rows: All that was measured.
    """
    groups, names = _groups(rows), _names(rows)
    figure = Figure(figsize=(7.2, 0.6 + 0.75 * len(groups)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for at, name in enumerate(names):
        own = [r for r in rows if r.way == name]
        places = [groups.index((r.network, r.layout, r.mode)) + at * height for r in own]
        errors = [[r.ratio - r.ratio_q25 for r in own], [r.ratio_q75 - r.ratio for r in own]]
        axes.barh(places, [r.ratio for r in own], height * 0.9, xerr=errors, label=name)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_yticks([g + 0.4 - height / 2 for g in range(len(groups))])
    axes.set_yticklabels([f"{n}\n{layout}, {mode}" for n, layout, mode in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times the speed of the model as it is")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", fontsize=8, frameon=False, ncols=len(names))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()
