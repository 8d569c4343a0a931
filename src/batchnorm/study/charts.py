"""What a picture shows, said once: `interactive` draws it for the screen, `pictures` for paper."""

from __future__ import annotations

import math
import textwrap
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
    "after": Style("batchnorm after", "#0072B2"),
    "ghost": Style("ghost", "#A0740A"),
    "renormalized": Style("renormalized", "#B0578D"),
    "dropout": Style("dropout", "#A0740A"),
    "both": Style("batchnorm + dropout", "#B0578D"),
    "float32": Style("float32", "#B0578D"),
    "float64": Style("float64", "#6E7681"),
    "other": Style("other", "#6E7681"),
}

_LABEL_HEIGHT = 0.075  # of a panel, so that two labels never touch
_LABEL_WIDTH = 12  # letters, so that a panel on a phone has room for both lines and labels
_TICKS_WIDTH = 42  # letters below a panel, all marks together
_WORD = 6  # letters that stay in a line in any case
_FEW = 6  # marks along an axis


def wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines at its spaces; a longer word stays whole.

    Example:
        >>> wrapped("batchnorm + dropout", 12)
        ['batchnorm +', 'dropout']
    """
    lines = textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)
    return lines or [""]


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
        name: What it is called; by default as its style is.
    """

    style: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    mark: Literal["line", "dots", "bar"] = "line"
    name: str = ""

    @property
    def label(self) -> str:
        """What a reader calls it."""
        return self.name or STYLES[self.style].name

    @property
    def lines(self) -> list[str]:
        """The label, as it stands at the end of a line."""
        return wrapped(self.label, _LABEL_WIDTH)


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
        if self.log and value <= 0:
            return 0.0
        start, end, value = (math.log(v) if self.log else v for v in (self.start, self.end, value))
        return (value - start) / (end - start)

    def marks(self) -> list[tuple[float, list[str]]]:
        """Return the values that are marked, and the lines that stand there.

        None of a linear axis without `ticks`: whoever draws finds round numbers.

        Example:
            >>> [value for value, _ in Axis("steps", 3, 300, log=True).marks()]
            [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]
        """
        ticks = self.ticks or (self._round() if self.log else ())
        width = max(_TICKS_WIDTH // max(len(ticks), 1), _WORD)
        return [(value, wrapped(text, width)) for value, text in ticks]

    def _round(self) -> list[tuple[float, str]]:
        """Round numbers along a log axis: powers of 10, or more if these are too few."""
        low, high = math.log10(self.start) - 1e-9, math.log10(self.end) + 1e-9
        powers = range(math.ceil(low), math.floor(high) + 1)
        values = [10.0**power for power in powers]
        for digits in ((1, 2, 5), range(1, 10), range(10, 100)):
            if len(values) < 3:
                grid = [d * 10.0**p for p in range(powers.start - 2, powers.stop) for d in digits]
                values = [value for value in grid if low <= math.log10(value) <= high]
        values = values[:: max(1, math.ceil((len(values) - 1) / _FEW))]
        return [(value, f"{value:g}".replace("e+0", "e").replace("e-0", "e-")) for value in values]


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

    def labels(self) -> list[tuple[Series, float]]:
        """Return each line, and how high its label stands, apart from the others."""
        lines = [line for line in self.series if line.mark == "line"]
        ends = [(self._end(line), line) for line in lines if any(map(math.isfinite, line.y))]
        placed: list[tuple[Series, float]] = []
        top = -math.inf
        for end, line in sorted(ends, key=lambda pair: pair[0]):
            half = len(line.lines) * _LABEL_HEIGHT / 2
            placed.append((line, max(end, top + half)))
            top = placed[-1][1] + half
        above = max(0.0, placed[-1][1] - 1.0) if placed else 0.0
        return [(line, height - above) for line, height in placed]

    def _end(self, line: Series) -> float:
        """How high a line ends, within the panel."""
        last = next(value for value in reversed(line.y) if math.isfinite(value))
        return min(max(self.y.place(last), 0.0), 1.0)


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        name: What its file is called, after the name of the claim.
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
        return [panel for panel in self.panels if panel.choice in ("", self.first)]

    @property
    def choices(self) -> list[str]:
        """What may be chosen, in the order of the panels."""
        return list(dict.fromkeys(panel.choice for panel in self.panels if panel.choice))

    @property
    def first(self) -> str:
        """The choice that is shown first: `chosen`, if there is a panel of it."""
        choices = self.choices
        return self.chosen if self.chosen in choices or not choices else choices[0]
