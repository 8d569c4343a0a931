"""Charts for the screen: Plotly's JSON, which the report's page hands to plotly.js.

Whatever has the colour of ink or paper is coloured by the page's style, which knows whether it is
dark or light, on a screen or printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from batchnorm.study.charts import STYLES, Axis, Panel, Series, wrapped

_FONT = {"family": "system-ui, sans-serif", "size": 13}
_FAINT = "#888"  # what the page's style takes for its own soft ink
_LETTER = 8.6  # pixels of a label's letter
_WIDEST = 160  # pixels for all labels, whatever a name is
_TITLE = 36  # letters of a line beside an axis, which is as long as a phone leaves it
_BARS = 220  # pixels for all bars of a panel on a phone


def figure(panel: Panel) -> dict[str, Any]:
    """Return a panel as a Plotly figure.

    Args:
        panel: What is drawn.

    Returns:
        A dictionary with `data` and `layout`, fit for JSON: what is no number in it is null.
    """
    labels = panel.labels()
    widest = max((len(part) for line, _ in labels for part in line.lines), default=0)
    notes = [
        _note(1, height, line.lines, STYLES[line.style].colour, xanchor="left", xshift=6)
        for line, height in labels
    ]
    shapes = []
    if panel.goal and 0 <= panel.y.place(panel.goal[0]) <= 1:
        value, name = panel.goal
        line = {"color": _FAINT, "width": 1, "dash": "dot"}
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
        shapes = [{"type": "line", "line": line, **ends}]
        place = panel.y.place(value)
        anchor = "bottom" if place < 0.9 else "top"
        notes += [_note(0, place, [name], _FAINT, 400, xanchor="left", yanchor=anchor)]
    bars = sum(series.mark == "bar" for series in panel.series)
    return {
        "data": [trace for series in panel.series for trace in _traces(series, bars)],
        "layout": {
            "annotations": notes,
            "font": _FONT,
            "height": 340,
            "hovermode": "closest",
            "margin": {"l": 58, "r": min(round(12 + _LETTER * widest), _WIDEST), "t": 12, "b": 48},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "shapes": shapes,
            "showlegend": False,
            "xaxis": _axis(panel.x),
            "yaxis": _axis(panel.y),
        },
    }


def _traces(series: Series, bars: int) -> list[dict[str, Any]]:
    _, colour, width, opacity = STYLES[series.style]
    name = _text([series.label]).replace("%", "&#37;")  # which would begin a value's place
    trace: dict[str, Any] = {
        "x": _numbers(series.x),
        "y": _numbers(series.y),
        "hovertemplate": f"{name}: %{{y:.4~g}} at %{{x:.4~g}}<extra></extra>",
        "hoverlabel": {"bgcolor": colour, "font": {"color": "white"}},
    }
    if series.mark == "line":
        line = {"color": colour, "width": width}
        trace |= {"mode": "lines", "line": line, "opacity": opacity}
    elif series.mark == "dots":
        marker = {"color": colour, "size": 7, "opacity": 0.35}
        trace |= {"mode": "markers", "marker": marker}
        trace["hovertemplate"] = f"{name}: %{{y:.4~g}}<extra></extra>"
    else:
        size = min(38, _BARS // bars)
        line = {"color": colour, "width": 3}
        marker = {"symbol": "line-ew", "size": size, "color": colour, "line": line}
        trace |= {"mode": "markers", "marker": marker}
        trace["hovertemplate"] = f"{name}: %{{y:.4~g}}<extra></extra>"
    if not series.low:
        return [trace]
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    band = {
        "x": _numbers([*series.x, *reversed(series.x)]),
        "y": _numbers([*series.high, *reversed(series.low)]),
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.16)",
        "hoverinfo": "skip",
        "line": {"width": 0},
        "mode": "lines",
    }
    return [band, trace]


def _axis(axis: Axis) -> dict[str, Any]:
    ends = [math.log10(end) if axis.log else end for end in (axis.start, axis.end)]
    ticks: dict[str, Any] = {}
    if marks := axis.marks():
        ticks = {"tickvals": [value for value, _ in marks]}
        ticks["ticktext"] = [_text(lines) for _, lines in marks]
    return {
        "automargin": True,
        "exponentformat": "e",
        "fixedrange": True,  # a finger that scrolls the page must not zoom the picture
        "range": ends,
        "ticklabeloverflow": "allow",
        "tickcolor": "rgba(0,0,0,0)",  # only so that the marks of both axes stay apart
        "ticks": "outside",
        "title": {"text": _text(wrapped(axis.label, _TITLE)), "font": {"size": 13}},
        "type": "log" if axis.log else "linear",
        "zeroline": False,
        **ticks,
    }


def _note(
    x: float, y: float, lines: Sequence[str], colour: str, weight: int = 600, **place: Any
) -> dict[str, Any]:
    font = {"color": colour, "size": 13, "weight": weight}
    where = {"xref": "paper", "yref": "paper", "x": x, "y": y, "showarrow": False}
    text = {"text": _text(lines), "align": "left"}
    return where | text | {"font": font, "yanchor": "middle"} | place


def _text(lines: Sequence[str]) -> str:
    """Text for Plotly, which would take what looks like HTML for HTML."""
    return "<br>".join(escape(line, quote=False) for line in lines)


def _numbers(values: Iterable[float]) -> list[float | None]:
    """As many digits as can be seen; JSON knows neither infinity nor what is no number."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
