"""The report as Markdown, for a repository or a paper: the same words and numbers as the page."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.study.claims import Judgement
from batchnorm.study.story import Story
from batchnorm.study.table import markdown


def text(story: Story) -> str:
    """Write the report.

    Args:
        story: What came of the study.

    Returns:
        Markdown that shows the pictures in `figures`.
    """
    parts = ["# The study", story.lead, markdown(story).strip()]
    parts += [part for judgement in story.judgements for part in _section(judgement)]
    if story.broken_off:
        parts += ["## Runs that broke off", _table(("run", "why"), list(story.broken_off.items()))]
    parts += [
        "## What this was made on",
        f"{', '.join(f'{key} {value}' for key, value in story.made_on.items())}.",
        f"Do it again: `{story.command}`",
    ]
    return "\n\n".join(parts) + "\n"


def _section(judgement: Judgement) -> list[str]:
    claim, findings = judgement.claim, judgement.findings
    return [
        f"## {claim.title}: {judgement.answer}",
        " ".join(finding.sentence for finding in findings),
        f"> {claim.says} ({claim.source})",
        *(f"![{chart.caption}](figures/{chart.name}.png)" for chart in judgement.charts),
        _table(claim.headings, [row for finding in findings for row in finding.details]),
        f"How it was measured: {claim.measured} {claim.rule}",
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )
