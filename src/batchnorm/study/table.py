"""The answer in one table, for the terminal and for a README."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from batchnorm.study.charts import STYLES
from batchnorm.study.networks import NORMS
from batchnorm.study.story import LEGEND, Story


def terminal(story: Story) -> Table:
    """Return the table for a terminal of 80 columns.

    Args:
        story: What came of the study.

    Returns:
        A table that Rich prints.
    """
    title = escape(story.question)
    table = Table(title=title, caption=LEGEND, box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_style, table.caption_style = "bold", "dim"
    table.add_column("claim")
    table.add_column("network")
    for norm in NORMS:
        table.add_column(STYLES[norm].name, justify="right")
    table.add_column("effect")
    for judgement in story.judgements:
        claim, findings = judgement.claim, judgement.findings
        table.add_row(
            f"{claim.title}\n[dim]{claim.unit}[/]\n[bold]{judgement.answer}[/]",
            "\n".join(finding.network for finding in findings),
            *("\n".join(finding.cells.get(norm, "") for finding in findings) for norm in NORMS),
            "\n".join(finding.effect for finding in findings),
            end_section=True,
        )
    return table


def markdown(story: Story) -> str:
    """Return the table as Markdown.

    Args:
        story: What came of the study.

    Returns:
        The question, and a line for each claim and network.
    """
    headings = ["claim", "network", *(STYLES[norm].name for norm in NORMS), "effect", "verdict"]
    lines = [headings, ["---", "---", *("---:" for _ in NORMS), "---", "---"]]
    for judgement in story.judgements:
        claim = f"{judgement.claim.title} ({judgement.claim.unit})"
        verdict = f"**{judgement.answer}**"
        for finding in judgement.findings:
            cells = [finding.cells.get(norm, "") for norm in NORMS]
            lines.append([claim, finding.network, *cells, finding.effect, verdict])
            claim = verdict = ""  # said once
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{story.question}**\n\n{rows}\n\n{LEGEND}\n"
