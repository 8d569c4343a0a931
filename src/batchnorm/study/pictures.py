"""Charts for paper: PNG and SVG files, drawn by Matplotlib."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from batchnorm.study.charts import STYLES, Axis, Chart, Panel, Series
from batchnorm.study.errors import printable

_INK = "#22262c"
_FAINT = "#dde1e6"
_WIDTH, _HEIGHT = 5.2, 3.6  # of a panel, in inches
_LEFT, _TOP, _BOTTOM = 0.76, 0.34, 0.52
_LINE = 0.16  # the height of a line of letters
_LETTER = 0.09  # the width of a label's letter
_DPI = 100
_COLOURS = 128  # enough for lines and letters; a file is a third as large as with all
_SETTINGS: Any = {
    "text.parse_math": False,  # a name may hold any sign
    "svg.fonttype": "none",  # letters stay letters, which can be searched and edited
    "svg.hashsalt": "batchnorm",  # the same chart is the same file
}


def files(chart: Chart) -> Mapping[str, bytes]:
    """Draw the panels of a chart's first choice, two in a row.

    Args:
        chart: What is drawn.

    Returns:
        The contents of the files, by their suffix: `png` and `svg`.
    """
    with rc_context(_SETTINGS), warnings.catch_warnings():
        # A sign that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = _figure(chart)
        return {"png": _png(figure), "svg": _svg(figure)}


def png(chart: Chart) -> bytes:
    """Return the content of a chart's PNG file."""
    return files(chart)["png"]


def _figure(chart: Chart) -> Figure:
    panels = chart.shown()
    columns, rows = min(len(panels), 2) or 1, math.ceil(len(panels) / 2) or 1
    labels = [part for panel in panels for line, _ in panel.labels() for part in line.lines]
    right = 0.2 + _LETTER * max(map(len, labels), default=0)
    marks = [lines for panel in panels for _, lines in panel.x.marks()]
    bottom = _BOTTOM + _LINE * (max(map(len, marks), default=1) - 1)
    height = _HEIGHT + bottom - _BOTTOM
    figure = Figure(figsize=(columns * _WIDTH, rows * height))
    # Places are said, not found out: Matplotlib's own layout takes as long as drawing.
    for place, panel in enumerate(panels):
        row, column = divmod(place, 2)
        x, y = column * _WIDTH + _LEFT, (rows - 1 - row) * height + bottom
        size = _WIDTH - _LEFT - right, height - _TOP - bottom
        box = np.divide([x, y, *size], [columns * _WIDTH, rows * height] * 2)
        axes = figure.add_axes(tuple(box))
        _draw(axes, panel)
        axes.xaxis.set_label_coords(0.5, (0.06 - bottom) / size[1])
        axes.yaxis.set_label_coords(-0.54 / size[0], 0.5)
    return figure


def _png(figure: Figure) -> bytes:
    figure.set_dpi(_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    content = io.BytesIO()
    image = image.quantize(_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(content, "png", dpi=(_DPI, _DPI))
    return content.getvalue()


def _svg(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _draw(axes: Axes, panel: Panel) -> None:
    bars = sum(series.mark == "bar" for series in panel.series)
    for series in panel.series:
        _draw_series(axes, series, bars)
    if panel.goal and 0 <= panel.y.place(panel.goal[0]) <= 1:
        value, name = panel.goal
        axes.axhline(value, color="#888888", linewidth=1, linestyle=":", zorder=1)
        above = panel.y.place(value) < 0.9
        place = 0.01, panel.y.place(value) + (0.01 if above else -0.015)
        note = axes.annotate(printable(name), place, xycoords="axes fraction")
        note.set(color="#666666", fontsize=9, va="bottom" if above else "top")
    for line, height in panel.labels():
        label = axes.annotate(_text(line.lines), (1.02, height), xycoords="axes fraction")
        label.set(color=STYLES[line.style].colour, fontsize=10, fontweight="bold", va="center")
    _set(axes, "x", panel.x)
    _set(axes, "y", panel.y)
    axes.set_title(
        printable(panel.title), loc="left", y=1, fontsize=11, fontweight="bold", color=_INK
    )
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa1ab")
    axes.tick_params(which="both", color="#9aa1ab", labelcolor=_INK, labelsize=9.5)


def _draw_series(axes: Axes, series: Series, bars: int) -> None:
    _, colour, width, opacity = STYLES[series.style]
    x, y = series.x, series.y
    if series.mark == "line":
        axes.plot(x, y, color=colour, linewidth=0.8 * width, alpha=opacity)
    elif series.mark == "dots":
        axes.scatter(x, y, s=22, color=colour, alpha=0.35, linewidths=0)
    else:
        size = min(30, 170 // bars)
        axes.scatter(x, y, s=size**2, color=colour, marker="_", linewidths=2.5)
    if series.low:
        axes.fill_between(x, series.low, series.high, color=colour, alpha=0.16, linewidth=0)


def _set(axes: Axes, side: str, axis: Axis) -> None:
    scale = "log" if axis.log else "linear"
    axes.set(**{f"{side}scale": scale, f"{side}lim": (axis.start, axis.end)})
    axes.set(**{f"{side}label": printable(axis.label)})
    drawn = axes.xaxis if side == "x" else axes.yaxis
    drawn.label.set(color=_INK, fontsize=10, va="bottom")
    if marks := axis.marks():
        drawn.set_ticks([value for value, _ in marks], [_text(lines) for _, lines in marks])
        drawn.set_minor_locator(NullLocator())


def _text(lines: Sequence[str]) -> str:
    return "\n".join(map(printable, lines))
