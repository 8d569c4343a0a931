"""Charts for the screen: Plotly's JSON, which the report's page hands to plotly.js.

Whatever has the colour of ink or paper is coloured by the page's style, which knows whether it is
dark or light, on a screen or printed.
"""

from __future__ import annotations

import math
from typing import Any

from batchnorm.study.charts import STYLES, Axis, Panel, Series

_FONT = {"family": "system-ui, sans-serif", "size": 13}


def figure(panel: Panel) -> dict[str, Any]:
    """Return a panel as a Plotly figure.

    Args:
        panel: What is drawn.

    Returns:
        A dictionary with `data` and `layout`, fit for JSON.
    """
    labels = [
        _note(1, height, STYLES[style].name, STYLES[style].colour, xanchor="left", xshift=6)
        for style, height in panel.labels()
    ]
    shapes = []
    if panel.goal:
        value, name = panel.goal
        shapes = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": value,
                "y1": value,
                "line": {"color": "#888", "width": 1, "dash": "dot"},
            }
        ]
        labels += [_note(0, panel.y.place(value), name, "#888", xanchor="left", yanchor="bottom")]
    return {
        "data": [trace for series in panel.series for trace in _traces(series)],
        "layout": {
            "annotations": labels,
            "font": _FONT,
            "height": 340,
            "hovermode": "closest",
            "margin": {"l": 58, "r": 92 if panel.labels() else 12, "t": 12, "b": 48},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "shapes": shapes,
            "showlegend": False,
            "xaxis": _axis(panel.x),
            "yaxis": _axis(panel.y),
        },
    }


def _traces(series: Series) -> list[dict[str, Any]]:
    name, colour, width, opacity = STYLES[series.style]
    trace: dict[str, Any] = {
        "x": list(series.x),
        "y": list(series.y),
        "hovertemplate": f"{name}: %{{y:.4~g}} at %{{x:.4~g}}<extra></extra>",
        "hoverlabel": {"bgcolor": colour, "font": {"color": "white"}},
    }
    if series.mark == "line":
        trace |= {
            "mode": "lines",
            "line": {"color": colour, "width": width},
            "opacity": opacity,
        }
    elif series.mark == "dots":
        marker = {"color": colour, "size": 7, "opacity": 0.35}
        trace |= {"mode": "markers", "marker": marker}
    else:
        line = {"color": colour, "width": 3}
        marker = {"symbol": "line-ew", "size": 38, "color": colour, "line": line}
        trace |= {"mode": "markers", "marker": marker}
    if not series.low:
        return [trace]
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    band = {
        "x": [*series.x, *reversed(series.x)],
        "y": [*series.high, *reversed(series.low)],
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
    if axis.ticks:
        values, texts = zip(*axis.ticks, strict=True)
        ticks = {"tickvals": values, "ticktext": texts}
    elif axis.log:
        ticks = {"dtick": 1}
    return {
        "automargin": True,
        "fixedrange": True,  # a finger that scrolls the page must not zoom the picture
        "range": ends,
        "title": {"text": axis.label},
        "type": "log" if axis.log else "linear",
        "zeroline": False,
        **ticks,
    }


def _note(x: float, y: float, text: str, colour: str, **place: Any) -> dict[str, Any]:
    font = {"color": colour, "size": 13, "weight": 600}
    where = {"xref": "paper", "yref": "paper", "x": x, "y": y, "showarrow": False}
    return where | {"text": text, "font": font, "yanchor": "middle"} | place
