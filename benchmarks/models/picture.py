"""The speed and the memory of all networks, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.models.rows import Row
from benchmarks.models.ways import (
    ACCELERATED,
    COMPILED,
    CONVERTED,
    FOLDED,
    INFERENCE,
    SAVING,
    TRAINING,
)

_COLOURS = {
    CONVERTED.name: "#8b949e",
    ACCELERATED.name: "#1f6feb",
    SAVING.name: "#a371f7",
    FOLDED.name: "#2da44e",
    COMPILED.name: "#d29922",
}
_HEIGHT = 0.8


def png(rows: Sequence[Row]) -> bytes:
    """Draw how many times the speed of the model as it is each way has, and what training keeps.

    The thin lines go from the lower to the upper quartile.

    Args:
        rows: All that was measured.

    Returns:
        The content of a PNG file.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    training, inference, kept = figure.subplots(1, 3, sharey=True)
    names = list(dict.fromkeys(f"{row.network}, {row.layout}" for row in rows))
    for axes, mode in ((training, TRAINING), (inference, INFERENCE)):
        chosen = [row for row in rows if row.mode == mode]
        _bars(axes, names, chosen, [(r.ratio, r.ratio_q25, r.ratio_q75) for r in chosen])
        axes.set_title(f"{mode}: times the speed of stock", loc="left", fontsize=10)
    stored = [(row, row.kept_ratio) for row in rows if row.kept_ratio is not None]
    _bars(kept, names, [row for row, _ in stored], [(ratio,) * 3 for _, ratio in stored])
    kept.set_title("kept for the backward pass / stock", loc="left", fontsize=10)
    training.set_yticks(range(len(names)), names, fontsize=9)
    training.invert_yaxis()
    ways = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
    for axes in (inference, kept):
        ways |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(ways.values(), ways, loc="outside lower center", ncols=5, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _bars(
    axes: Axes,
    names: list[str],
    rows: Sequence[Row],
    values: Sequence[tuple[float, float, float]],
) -> None:
    """Draw a bar for each row, those of a network and layout beside each other."""
    ways = [name for name in _COLOURS if any(row.way == name for row in rows)]
    thick = _HEIGHT / max(len(ways), 1)
    for at, way in enumerate(ways):
        own = [(row, value) for row, value in zip(rows, values, strict=True) if row.way == way]
        places = [
            names.index(f"{row.network}, {row.layout}") + (at - (len(ways) - 1) / 2) * thick
            for row, _ in own
        ]
        middle = [value[0] for _, value in own]
        around = [[m - v[1] for m, (_, v) in zip(middle, own, strict=True)],
                  [v[2] - m for m, (_, v) in zip(middle, own, strict=True)]]  # fmt: skip
        axes.barh(places, middle, thick * 0.9, color=_COLOURS[way], label=way, xerr=around,
                  error_kw={"linewidth": 0.8, "ecolor": "#444444"})  # fmt: skip
    axes.axvline(1, color="#888888", linewidth=1)
    axes.grid(axis="x", color="#dde1e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
