"""What a picture shows, said once: `interactive` draws it for the screen, `pictures` for paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Style(NamedTuple):
    """How a series looks, wherever it is drawn."""

    name: str
    colour: str
    width: float = 2.0
    opacity: float = 1.0


# Colour-blind readers can tell these apart (Okabe and Ito), and they can be read on white and on
# near-black. The lines of torch.nn and ours lie on each other: the wide one shows on both sides.
STYLES = {
    "plain": Style("plain", "#D55E00"),
    "torch": Style("torch.nn", "#0072B2", width=6.0, opacity=0.45),
    "batchnorm": Style("batchnorm", "#009E73"),
    "float32": Style("float32", "#B0578D"),
    "float64": Style("float64", "#6E7681"),
}

_LABEL_HEIGHT = 0.075  # of a panel, so that two labels never touch


@dataclass(frozen=True)
class Series:
    """Values that belong together, mostly those of a norm.

    Attributes:
        style: One of `STYLES`.
        x: Where the values are.
        y: The values.
        low: The lower end of a band around each, if there is one.
        high: The upper end.
        mark: Whether they are a `line`, `dots`, or a short `bar` each.
    """

    style: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    mark: Literal["line", "dots", "bar"] = "line"


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        label: What is along it, with the unit.
        start: The value at its beginning.
        end: The value at its end.
        log: Whether equal ratios are equally long.
        ticks: The values that are marked, with what stands there; by default round numbers.
    """

    label: str
    start: float
    end: float
    log: bool = False
    ticks: Sequence[tuple[float, str]] = ()

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 at the start to 1 at the end.

        Example:
            >>> Axis("steps", 1, 100, log=True).place(10)
            0.5
        """
        start, end, value = (math.log(v) if self.log else v for v in (self.start, self.end, value))
        return (value - start) / (end - start)


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: What sets it apart from the other panels.
        x: The horizontal axis.
        y: The vertical axis.
        series: What is drawn.
        goal: A height that is marked across the panel, and its name.
        choice: With which choice of the reader's it is shown; empty for always.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    goal: tuple[float, str] | None = None
    choice: str = ""

    def labels(self) -> list[tuple[str, float]]:
        """Return the style of each line, and how high its label stands, apart from the others."""
        ends = [
            (min(max(self.y.place(line.y[-1]), 0.0), 1.0), line.style)
            for line in self.series
            if line.mark == "line" and line.y
        ]
        placed: list[tuple[str, float]] = []
        height = -math.inf
        for end, style in sorted(ends):
            height = max(end, height + _LABEL_HEIGHT)
            placed.append((style, height))
        above = max(0.0, height - 1.0)
        return [(style, height - above) for style, height in placed]


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        name: What its file is called.
        caption: What is to be seen, in a sentence or two.
        panels: Side by side where there is room.
        choice: What the reader may choose, such as a learning rate; empty for nothing.
        chosen: The choice that is shown first, and in print.
    """

    name: str
    caption: str
    panels: Sequence[Panel]
    choice: str = ""
    chosen: str = ""

    def shown(self) -> list[Panel]:
        """Return the panels of the first choice."""
        return [panel for panel in self.panels if panel.choice in ("", self.chosen)]
