"""The speed by size, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from batchnorm.bench.cases import BOTH, RELU
from batchnorm.bench.contenders import BASE, NATIVE, PEERS
from batchnorm.bench.rows import Row

_COLOURS = {
    NATIVE.name: "#1f6feb",
    **dict(zip((p.name for p in PEERS.values()), ("#8b949e", "#d29922", "#a371f7"), strict=True)),
}
_MARKS = {"float32": "o", "bfloat16": "s"}


def png(rows: Sequence[Row]) -> bytes:
    """Draw how many times the speed of `torch.nn` each has for BN + ReLU, by the batch's size.

    What has the channels last is drawn hollow. Where other things were measured alone, those are
    drawn.

    Args:
        rows: All that was measured.

    Returns:
        The content of a PNG file.
    """
    some = rows[0]
    main = [row for row in rows if row.mode == BOTH and row.fusion == RELU]
    mode, fusion = (BOTH, RELU) if main else (some.mode, some.fusion)
    most = max(row.threads for row in rows)
    chosen = [r for r in rows if (r.mode, r.fusion, r.threads) == (mode, fusion, most)]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in _COLOURS.items():
        for dtype, mark in _MARKS.items():
            for last in (False, True):
                points = [
                    (row.mb, row.ratio)
                    for row in chosen
                    if (row.implementation, row.dtype) == (name, dtype)
                    if row.layout.endswith("C") == last
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    label = f"{name}, {dtype}{', channels last' if last else ''}"
                    face = "none" if last else colour
                    axes.scatter(x, y, marker=mark, facecolors=face, edgecolors=colour, label=label)
    axes.axhline(1, color="#888888", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="size of the batch, MB")
    axes.set_ylabel(f"times the speed of {BASE.name}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    plural = "s" if most > 1 else ""
    axes.set_title(f"BN, {fusion}, {mode}, {most} thread{plural}", loc="left", fontsize=11)
    axes.grid(color="#dde1e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.collections:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()
