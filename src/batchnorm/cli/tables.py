"""What the commands for models show: tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.cli import shift_words as words
from batchnorm.diagnose.shift_report import p_text
from batchnorm.study.errors import printable

if TYPE_CHECKING:
    from batchnorm.diagnose.adapt import AdaptReport
    from batchnorm.diagnose.shift_report import ShiftReport
    from batchnorm.models.fold import FoldReport
    from batchnorm.models.programs.moved import ProgramReport

#: How many layers and channels are shown, those that moved most.
_MOST_LAYERS, _MOST_CHANNELS = 12, 5


def folded(report: FoldReport, error: float) -> RenderableType:
    """Return what was folded into what, what was left and why, and how large the error is.

    Args:
        report: What folding says.
        error: The largest error of what is in the file, read again.
    """
    rows = [
        (name or "itself", ", ".join(_beside(name, other) for other in into))
        for name, into in report.folded.items()
    ]
    verdict = "verified" if report.tol is not None and error <= report.tol else "differs"
    return Group(
        table(("batch norm", "folded into"), rows, "ll"),
        _left(report.left),
        line(
            f"{len(report.folded)} folded, {len(report.left)} left; {verdict}: largest error "
            f"{error:.1e}, allowed {report.tol:.1e}"
        ),
    )


def calibrated(report: ProgramReport) -> RenderableType:
    """Return what calibrating moved, layer by layer, and what was left."""
    rows = [
        (
            name or "itself",
            f"{moved.values:,}",
            " → ".join(f"{value:.3g}" for value in moved.mean),
            " → ".join(f"{value:.3g}" for value in moved.var),
            f"{moved.change:.1%}" if moved.change < 10 else f"{moved.change:.3g}×",
        )
        for name, moved in report.moved.items()
    ]
    batches = f"{report.batches} batch{'es' if report.batches != 1 else ''}"
    return Group(
        table(("batch norm", "values", "mean", "variance", "change"), rows, "lrrrr"),
        _left(report.left),
        line(
            f"{len(report.done)} calibrated, {len(report.left)} left; "
            f"{batches}{left_over(report.unused)}"
        ),
        line(
            "values: a channel. mean, variance: averages over the channels. change: the largest of "
            "a channel, of its mean in standard deviations or of its variance."
        ),
    )


def shifted(report: ShiftReport, unused: int = 0) -> RenderableType:
    """Return how far layers and channels moved, and what that means.

    Args:
        report: What was measured.
        unused: How many examples at the end of the data were too few for a call.
    """
    layers = list(report.layers.items())
    rest = len(layers) - _MOST_LAYERS
    if rest > 0:
        layers = sorted(layers, key=lambda item: -item[1].score)[:_MOST_LAYERS]
    rows = [
        (
            name or "itself",
            f"{layer.score:.3g}",
            f"{layer.noise:.2g}",
            p_text(layer.p_value),
            "{1} of {0}".format(*layer.channels),
            "shifted" if layer.shifted else "",
        )
        for name, layer in layers
    ]
    moved = [
        (c.layer or "itself", str(c.channel), f"{c.mean:+.2f} sd", f"×{c.ratio:.3g}")
        for c in report.channels[:_MOST_CHANNELS]
        if c.shifted
    ]
    parts = [table(("batch norm", "score", "by chance", "p", "channels moved", ""), rows, "lrrrrl")]
    if rest > 0:
        parts.append(line(f"and {rest} more, which moved less"))
    if report.shifted and moved:
        worst = table(("moved most", "channel", "mean", "variance"), moved, "lrrr")
        parts += [line(""), worst, line("")]
    parts += [
        _left(report.left),
        line(f"{words.verdict(report)}: {words.numbers(report)}{left_over(unused)}."),
        line(words.meaning(report)),
    ]
    parts += [line(f"{number}. {text}") for number, text in enumerate(words.advice(report), 1)]
    return Group(*parts)


def adapted(report: AdaptReport, unused: int = 0) -> RenderableType:
    """Return how much the data count in the statistics of each layer, and what shift is left.

    Args:
        report: What adapting says.
        unused: How many examples at the end of the data were too few for a call.
    """
    before, after = report.before, report.after
    assert before is not None  # of a report that is whole
    assert after is not None
    rows = [
        (
            name or "itself",
            f"{weight:.1%}",
            *(f"{shift.layers[name].score:.3g}" if name in shift.layers else ""
              for shift in (before, after)),
        )
        for name, weight in report.weights.items()
    ]  # fmt: skip
    none = "" if before.shifted else "; there was no shift to adapt to"
    return Group(
        table(("batch norm", "weight", "score before", "after"), rows, "lrrr"),
        _left(report.left),
        line(
            f"{len(report.done)} adapted, {len(report.left)} left; shift {before.score:.3g} → "
            f"{after.score:.3g} nats, {report.examples:,} examples{left_over(unused)}{none}"
        ),
        line("weight: how much the data count, beside what the layer remembers of its training."),
    )


def left_over(count: int) -> str:
    """Return that so many examples at the end of the data were too few for a call."""
    return f"; the last {count} examples make no batch" if count else ""


def _beside(name: str, other: str) -> str:
    """Return what a layer is called beside another one: `.convolution`, say."""
    parent = name.rpartition(".")[0]
    return other.removeprefix(parent) if parent and other.startswith(f"{parent}.") else other


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> RenderableType:
    """Return rows below their titles; none if there are none.

    Args:
        titles: What stands above the columns.
        rows: The cells, as text.
        sides: For each column, `l` or `r`.
    """
    if not rows:
        return Text("", end="")
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title, side in zip(titles, sides, strict=True):
        right = side == "r"
        grid.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    return grid


def _left(left: Mapping[str, str]) -> RenderableType:
    return table(("left", "because"), [(n or "itself", why) for n, why in left.items()], "ll")


def line(text: str) -> RenderableType:
    """Return a text, of which every sign can be seen."""
    return Text(printable(text))
