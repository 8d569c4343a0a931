"""The report's page: HTML that carries all it needs, and loads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from batchnorm.study.charts import Chart, Panel
from batchnorm.study.claims import Finding, Judgement
from batchnorm.study.interactive import figure
from batchnorm.study.markup import Html, badge, checks, document, file, table
from batchnorm.study.story import (
    COLUMNS,
    LEGEND,
    Story,
    each,
    heading,
    left_out,
    lines,
    median,
)

_MANY = 2  # panels of a picture on the screen at first; of more, those of one part
_ESCAPED_LESS = "\\u003c"  # so that no text in JSON can end the script that it stands in


def page(story: Story) -> str:
    """Write the page.

    Args:
        story: What came of the study.

    Returns:
        A whole HTML document.
    """
    figures: list[dict[str, Any]] = []
    sections = "".join(_section(judgement, story, figures) for judgement in story.judgements)
    body = f"""<header>
<h1>{escape(story.question)}</h1>
<p class="lead">{escape(story.lead)}</p>
{_verdicts(story)}
</header>
<main>
{sections}
</main>
<footer>
{_broken_off(story)}
<section>
<h2>What this was made on</h2>
<dl>{"".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in story.made_on.items())}</dl>
<p>Beside this page, the folder “figures” has each picture as PNG and SVG, “results.csv” every value
and “effects.csv” every interval. Do all of it again:</p>
<pre><code>{escape(story.repeating())}</code></pre>
</section>
</footer>
<noscript>The pictures need JavaScript. The folder “figures” has them as files.</noscript>
"""
    body += f'<script type="application/json" id="figures">{encoded(figures)}</script>'
    return document(story.question, body, get_plotlyjs(), file("report.js"))


def encoded(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return panels for Plotly as JSON that can stand in a script."""
    return json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", _ESCAPED_LESS)


def _verdicts(story: Story) -> str:
    """The table of verdicts, with a link to the section of each claim."""
    bodies = []
    for judgement in story.judgements:
        claim, told = judgement.claim, lines(judgement.findings)
        head = (
            f'<td rowspan="{len(told)}"><a href="#{escape(claim.name)}">'
            f"{escape(heading(claim.number, claim.title))}</a><small>{escape(claim.unit)}</small>"
            f'</td><td rowspan="{len(told)}">{badge(judgement.answer)}</td>'
        )
        rows = []
        for part, without, with_, effect in told:
            rows.append(
                f'<tr>{head}<td class="part">{escape(part)}</td>'
                f'<td class="number" data-name="from">{escape(without)}</td>'
                f'<td class="number" data-name="to">{escape(with_)}</td>'
                f"<td>{escape(effect)}</td></tr>"
            )
            head = ""
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    headings = "".join(
        f'<th class="{"number" * (name in COLUMNS[:2])}">{name}</th>'
        for name in ("claim", "verdict", "part", *COLUMNS)
    )
    return (
        f'<div class="scroll" id="verdicts"><table class="verdicts"><thead><tr>{headings}</tr>'
        f'</thead>{"".join(bodies)}</table></div><p class="soft">'
        f"{escape(LEGEND)} {escape(story.left_out)}</p>"
    )


def _section(judgement: Judgement, story: Story, figures: list[dict[str, Any]]) -> str:
    claim, findings = judgement.claim, judgement.findings
    parts = [finding.part for finding in findings]
    found = "".join(f"<p>{escape(finding.sentence)}</p>" for finding in findings)
    missing = left_out(judgement)
    return f"""<section id="{escape(claim.name)}">
<h2>{escape(heading(claim.number, claim.title))} {badge(judgement.answer)}</h2>
{found}
<blockquote>{escape(claim.says)}<cite>{escape(claim.source)}</cite></blockquote>
{"".join(picture(*named, parts, figures) for named in judgement.figures.items())}
{checks(findings)}
{_numbers(judgement)}
<h3>How it was measured</h3>
<p>{escape(claim.measured)}</p>
<p>{escape(claim.rule)}</p>
{f"<p>{escape(missing)}</p>" if missing else ""}
<p class="soft">Do it again:</p>
<pre><code>{escape(story.repeating(claim))}</code></pre>
<p class="back"><a href="#verdicts">Back to the table</a></p>
</section>
"""


def picture(name: str, chart: Chart, parts: Sequence[str], figures: list[dict[str, Any]]) -> str:
    """Write a chart's place in the page.

    Args:
        name: What it is called.
        chart: What is drawn.
        parts: The parts of its claim.
        figures: The page's panels for Plotly, to which its own are added.
    """
    of = [_part(panel, parts) for panel in chart.panels]
    apart = dict.fromkeys(filter(None, of)) if len(chart.shown()) > _MANY else {}
    part = next(iter(apart)) if len(apart) > 1 else ""
    panels = []
    for panel, own in zip(chart.panels, of, strict=True):
        other = " other" * bool(part and own and own != part)
        hidden = " hidden" * (panel.choice not in ("", chart.first))
        panels.append(
            f'<div class="panel{other}" data-choice="{escape(panel.choice)}"'
            f' data-part="{escape(own)}"{hidden}><h4>{escape(panel.title)}</h4>'
            f'<div class="plot" data-figure="{len(figures)}"></div></div>'
        )
        figures.append(figure(panel))
    selects = ""
    if part:
        selects += _select("part", "Part", {**{name: name for name in apart}, "": "all"}, part)
    if len(chart.choices) > 1:
        choices = {choice: choice for choice in chart.choices}
        selects += _select("choice", chart.choice, choices, chart.first)
    return (
        f'<figure id="figure-{name}">{selects}<div class="panels">{"".join(panels)}</div>'
        '<p class="soft" hidden>This was not tried.</p>'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _part(panel: Panel, parts: Sequence[str]) -> str:
    """The part that a panel is of, which its title begins with; empty if with none."""
    of = [part for part in parts if re.match(rf"{re.escape(part)}(?![\w-])", panel.title)]
    return max(of, key=len, default="")


def _select(name: str, label: str, options: Mapping[str, str], chosen: str) -> str:
    told = "".join(
        f'<option value="{escape(value)}"{" selected" * (value == chosen)}>{escape(text)}</option>'
        for value, text in options.items()
    )
    return f'<label>{escape(label)} <select data-name="{name}">{told}</select></label>'


def _numbers(judgement: Judgement) -> str:
    """The numbers of each part; at first those of the first part are open."""
    tables: list[str] = []
    for finding in judgement.findings:
        if finding.rows:
            opened = "" if tables else " open"
            summary = f"<summary>{escape(finding.part)}</summary>"
            tables.append(f"<details{opened}>{summary}{_rows(finding)}</details>")
    return f'<h3>The numbers</h3><div class="numbers">{"".join(tables)}</div>' if tables else ""


def _rows(finding: Finding) -> Html:
    rows = []
    for row in finding.rows:
        values = f"<details><summary>{len(row.values)}</summary>{each(row.values)}</details>"
        numbers = median(row.values), str(row.effect or ""), Html(values)
        rows.append((row.condition, row.measure, *numbers))
    return table(("condition", "measure", "median", "effect", "values"), rows)


def _broken_off(story: Story) -> str:
    if not story.broken_off:
        return ""
    rows = table(("run", "why"), story.broken_off.items())
    return f"<section><h2>Runs that broke off</h2>{rows}</section>"
