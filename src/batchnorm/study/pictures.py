"""Charts for paper: PNG files, drawn by Matplotlib."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from batchnorm.study.charts import STYLES, Axis, Chart, Panel, Series

_INK = "#22262c"
_FAINT = "#dde1e6"


def png(chart: Chart) -> bytes:
    """Draw the panels of a chart's first choice, side by side.

    Args:
        chart: What is drawn.

    Returns:
        The content of a PNG file.
    """
    panels = chart.shown()
    figure = Figure(figsize=(5.2 * len(panels), 3.6))
    # Said, not found out: Matplotlib's own layout draws everything twice.
    figure.subplots_adjust(0.13 / len(panels), 0.15, 1 - 0.2 / len(panels), 0.91, wspace=0.5)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160)
    return content.getvalue()


def _draw(axes: Axes, panel: Panel) -> None:
    for series in panel.series:
        _draw_series(axes, series)
    if panel.goal:
        value, name = panel.goal
        axes.axhline(value, color="#888888", linewidth=1, linestyle=":", zorder=1)
        place = (0.01, panel.y.place(value) + 0.01)
        axes.annotate(name, place, xycoords="axes fraction", color="#666666", fontsize=9)
    for style, height in panel.labels():
        name, colour, *_ = STYLES[style]
        label = axes.annotate(name, (1.02, height), xycoords="axes fraction", va="center")
        label.set(color=colour, fontsize=10, fontweight="bold")
    _set(axes, "x", panel.x)
    _set(axes, "y", panel.y)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa1ab")
    axes.tick_params(which="both", color="#9aa1ab", labelcolor=_INK, labelsize=9.5)


def _draw_series(axes: Axes, series: Series) -> None:
    _, colour, width, opacity = STYLES[series.style]
    x, y = series.x, series.y
    if series.mark == "line":
        axes.plot(x, y, color=colour, linewidth=0.8 * width, alpha=opacity)
    elif series.mark == "dots":
        axes.scatter(x, y, s=22, color=colour, alpha=0.35, linewidths=0)
    else:
        axes.scatter(x, y, s=900, color=colour, marker="_", linewidths=2.5)
    if series.low:
        axes.fill_between(x, series.low, series.high, color=colour, alpha=0.16, linewidth=0)


def _set(axes: Axes, side: str, axis: Axis) -> None:
    scale = "log" if axis.log else "linear"
    axes.set(**{f"{side}scale": scale, f"{side}lim": (axis.start, axis.end)})
    axes.set(**{f"{side}label": axis.label})
    drawn = axes.xaxis if side == "x" else axes.yaxis
    drawn.label.set(color=_INK, fontsize=10)
    if axis.ticks:
        values, texts = zip(*axis.ticks, strict=True)
        drawn.set_ticks(values, texts)
        drawn.set_minor_locator(NullLocator())
    elif axis.log:
        drawn.set_major_formatter(lambda value, _: f"{value:g}")
