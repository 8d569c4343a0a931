"""The report as Markdown, for a repository or a paper: the same words and numbers as the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from batchnorm.study.claims import Judgement
from batchnorm.study.story import (
    ALONE,
    COLUMNS,
    LEGEND,
    Story,
    each,
    heading,
    left_out,
    lines,
    median,
    sign,
)

_MANY = 10  # values in a cell; all of them are in results.csv
_SIGNS = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)")


def text(story: Story) -> str:
    """Write the report.

    Args:
        story: What came of the study.

    Returns:
        Markdown that shows the pictures in `figures`.
    """
    parts = ["# The study", escaped(story.lead), table(story).strip()]
    parts += [part for judgement in story.judgements for part in _section(judgement, story)]
    if story.broken_off:
        parts += ["## Runs that broke off", rows(("run", "why"), list(story.broken_off.items()))]
    made_on = ", ".join(f"{key} {value}" for key, value in story.made_on.items())
    parts += ["## What this was made on", f"{escaped(made_on)}.", "Do it again:"]
    parts += [code(story.repeating())]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(story: Story) -> str:
    """Return the table of verdicts.

    Args:
        story: What came of the study.

    Returns:
        The question, and a line for each claim and part.
    """
    told = []
    for judgement in story.judgements:
        claim = f"{heading(judgement.claim.number, judgement.claim.title)} ({judgement.claim.unit})"
        answer: str = judgement.answer
        for part, *cells in lines(judgement.findings):
            told.append([claim, answer, part, *cells])
            claim = answer = ""  # said once
    every = rows(("claim", "verdict", "part", *COLUMNS), told, "lllrrl")
    legend = " ".join(filter(None, (LEGEND, story.left_out)))
    return f"**{escaped(story.question)}**\n\n{every}\n\n{legend}\n"


def escaped(text: str) -> str:
    r"""Return a text in one line, as Markdown that shows it as it is.

    Example:
        >>> print(escaped("a_b *and* <img>"))
        a_b \*and\* &lt;img&gt;
    """
    line = escape(" ".join(text.split()), quote=False)
    return _SIGNS.sub(lambda found: "&#124;" if found[0] == "|" else f"\\{found[0]}", line)


def rows(headings: Sequence[str], cells: Sequence[Sequence[str]], sides: str = "") -> str:
    """Return a table.

    Args:
        headings: What stands above the columns.
        cells: The rows, as text.
        sides: Whether each column stands to the left (`l`, as by default) or to the right (`r`).
    """
    rules = ["---:" if side == "r" else "---" for side in sides.ljust(len(headings), "l")]
    lines = [headings, rules, *([escaped(cell) for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Return a block of code; none of its lines ends it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}sh\n{text}\n{fence}"


def _section(judgement: Judgement, story: Story) -> list[str]:
    claim, findings = judgement.claim, judgement.findings
    checks = [
        f"- {sign(held)} {escaped(f'{finding.part}: {what}')}"
        for finding in findings
        for what, held in finding.checks.items()
    ]
    return [
        f"## {escaped(heading(claim.number, claim.title))}: {judgement.answer}",
        escaped(" ".join(finding.sentence for finding in findings)),
        f"> {escaped(claim.says)} ({escaped(claim.source)})",
        *(
            f"![{escaped(chart.caption)}](figures/{name}.png)"
            for name, chart in judgement.figures.items()
        ),
        f"{ALONE}:" if checks else "",
        "\n".join(checks),
        _numbers(judgement),
        f"How it was measured: {escaped(claim.measured)} {escaped(claim.rule)}",
        f"{escaped(left_out(judgement))} Do it again:".strip(),
        code(story.repeating(claim)),
    ]


def _numbers(judgement: Judgement) -> str:
    told = [
        (
            finding.part,
            row.condition,
            row.measure,
            median(row.values),
            each(row.values) if len(row.values) <= _MANY else f"{len(row.values)} values",
            str(row.effect or ""),
        )
        for finding in judgement.findings
        for row in finding.rows
    ]
    headings = ("part", "condition", "measure", "median", "one by one", "effect")
    return rows(headings, told, "lllrll") if told else ""
