"""The report's page: HTML that carries all it needs, and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from batchnorm.study.charts import STYLES, Chart, Panel
from batchnorm.study.claims import Judgement
from batchnorm.study.interactive import figure
from batchnorm.study.networks import NORMS
from batchnorm.study.story import LEGEND, Story

_HERE = Path(__file__).parent


def page(story: Story) -> str:
    """Write the page.

    Args:
        story: What came of the study.

    Returns:
        A whole HTML document.
    """
    panels = [panel for j in story.judgements for chart in j.charts for panel in chart.panels]
    figures = json.dumps([figure(panel) for panel in panels], separators=(",", ":"))
    title = escape(story.question)
    # The policy says to the browser, too, that nothing is to be loaded.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<style>{_file("report.css")}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="lead">{escape(story.lead)}</p>
{_verdicts(story.judgements)}
</header>
<main>
{"".join(_section(judgement, panels, story.command) for judgement in story.judgements)}
</main>
<footer>
{_broken_off(story.broken_off)}
<section>
<h2>What this was made on</h2>
<dl>{"".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in story.made_on.items())}</dl>
</section>
</footer>
<noscript>The pictures need JavaScript. The folder “figures” has them as files.</noscript>
<script type="application/json" id="figures">{figures.replace("<", _ESCAPED_LESS)}</script>
<script>{get_plotlyjs()}</script>
<script>{_file("report.js")}</script>
</body>
</html>
"""


_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
_ESCAPED_LESS = "\\u003c"  # so that no text in JSON can end the script that it stands in


def _verdicts(judgements: Sequence[Judgement]) -> str:
    """The table of verdicts, with a link to the section of each claim."""
    norms = "".join(f'<th class="number {norm}">{STYLES[norm].name}</th>' for norm in NORMS)
    bodies = []
    for judgement in judgements:
        claim, findings = judgement.claim, judgement.findings
        head = (
            f'<td rowspan="{len(findings)}"><a href="#{claim.name}">{escape(claim.title)}</a>'
            f"<small>{escape(claim.unit)}</small></td>"
            f'<td rowspan="{len(findings)}">{_badge(judgement)}</td>'
        )
        rows = []
        for finding in findings:
            cells = "".join(
                f'<td class="number" data-name="{STYLES[norm].name}">'
                f"{escape(finding.cells.get(norm, ''))}</td>"
                for norm in NORMS
            )
            network = f'<td class="network">{finding.network}</td>'
            rows.append(f"<tr>{head}{network}{cells}<td>{escape(finding.effect)}</td></tr>")
            head = ""
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return (
        '<div class="scroll"><table class="verdicts"><thead><tr><th>claim</th><th>verdict</th>'
        f"<th>network</th>{norms}<th>effect</th></tr></thead>{''.join(bodies)}</table></div>"
        f'<p class="soft">{escape(LEGEND)}</p>'
    )


def _badge(judgement: Judgement) -> str:
    return f'<span class="verdict {judgement.answer.split()[0]}">{judgement.answer}</span>'


def _section(judgement: Judgement, panels: Sequence[Panel], command: str) -> str:
    claim, findings = judgement.claim, judgement.findings
    found = " ".join(finding.sentence for finding in findings)
    rows = [row for finding in findings for row in finding.details]
    return f"""<section id="{claim.name}">
<h2>{escape(claim.title)} {_badge(judgement)}</h2>
<p>{escape(found)}</p>
<blockquote>{escape(claim.says)}<cite>{escape(claim.source)}</cite></blockquote>
{"".join(_figure(chart, panels) for chart in judgement.charts)}
<h3>The numbers</h3>
{_table(claim.headings, rows)}
<h3>How it was measured</h3>
<p>{escape(claim.measured)}</p>
<p>{escape(claim.rule)}</p>
<p class="soft">Do it again: <code>{escape(command)}</code></p>
</section>
"""


def _figure(chart: Chart, panels: Sequence[Panel]) -> str:
    choices = dict.fromkeys(panel.choice for panel in chart.panels)
    options = "".join(
        f"<option{' selected' * (choice == chart.chosen)}>{escape(choice)}</option>"
        for choice in choices
    )
    select = f"<label>{escape(chart.choice)} <select>{options}</select></label>"
    return (
        f'<figure id="{chart.name}">{select if len(choices) > 1 else ""}<div class="panels">'
        + "".join(
            f'<div class="panel" data-choice="{escape(panel.choice)}"'
            f"{' hidden' * (panel not in chart.shown())}><h4>{escape(panel.title)}</h4>"
            f'<div class="plot" data-figure="{panels.index(panel)}"></div></div>'
            for panel in chart.panels
        )
        + f"</div><figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _broken_off(runs: Mapping[str, str]) -> str:
    if not runs:
        return ""
    rows = _table(("run", "why"), list(runs.items()))
    return f"<section><h2>Runs that broke off</h2>{rows}</section>"


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
