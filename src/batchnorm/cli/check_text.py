"""What `batchnorm check` shows on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from batchnorm.cli import check_words as words
from batchnorm.cli.tables import left_over, line, table
from batchnorm.diagnose.check.finding import SEVERITIES, Finding
from batchnorm.diagnose.check.gap import OPEN
from batchnorm.diagnose.check.report import HealthReport, grouped

#: How many layers are shown: those that are off most.
_LAYERS = 12


def checked(report: HealthReport, unused: int = 0) -> RenderableType:
    """Return the verdict, the findings by their severity, and how far layers are off.

    Args:
        report: What was found.
        unused: How many examples at the end of the data were too few for a call.
    """
    return Group(*_parts(report, unused))


def _parts(report: HealthReport, unused: int) -> Iterator[RenderableType]:
    yield line(f"{words.verdict(report)}: {report.counts}{left_over(unused)}.")
    if report.accuracy is not None:
        yield line(words.accuracy(report))
    for severity in SEVERITIES:
        groups = grouped(finding for finding in report.findings if finding.severity == severity)
        for at, group in enumerate(groups, 1):
            number = f" {at}" if len(groups) > 1 else ""
            yield line("")
            yield line(f"{severity.upper()}{number}: {words.title(group[0])}")
            yield _of_group(group)
    if report.gaps:
        yield line("")
        yield from _gaps(report)


def _of_group(group: Sequence[Finding]) -> RenderableType:
    """Return where findings of one code are, what was seen, why, and what to do."""
    first, grid = group[0], Table.grid(padding=(0, 2, 0, 0))
    entries = [("where", words.place(group)), ("seen", first.evidence)]
    entries.append(("why", first.cause))
    entries += [("to do", step) for step in words.advice(group)]
    for name, told in entries:
        grid.add_row(line(name), line(told))
    return Padding(grid, (0, 0, 0, 2))


def _gaps(report: HealthReport) -> Iterator[RenderableType]:
    gaps = list(report.gaps.items())
    rest = len(gaps) - _LAYERS
    if rest > 0:
        gaps = sorted(gaps, key=lambda item: -item[1])[:_LAYERS]
    rows = [(name or "itself", f"{gap:.3g}", "far" if gap > OPEN else "") for name, gap in gaps]
    yield table(("batch norm", "off by", ""), rows, "lrl")
    if rest > 0:
        yield line(f"and {rest} more, which are off less")
    yield line(
        "off by: how far what a layer gets is from its statistics, in standard deviations; over "
        f"{OPEN} is far."
    )
