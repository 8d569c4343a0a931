"""HTML that is shared by the report's page and the one that compares two studies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from batchnorm.study.charts import STYLES
from batchnorm.study.claims import Finding
from batchnorm.study.story import ALONE, sign

_HERE = Path(__file__).parent
# It says to the browser, too, that nothing is to be loaded.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


class Html(str):
    """What is HTML already; any other text is escaped."""


def document(title: str, body: str, *scripts: str, wide: bool = False) -> str:
    """Return a whole page, which loads nothing.

    Args:
        title: Its title, as text.
        body: The rest, as HTML.
        scripts: What is run at the end.
        wide: Whether it takes all the room that there is.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{file("report.css")}{_colours()}</style>
</head>
<body{' class="wide"' if wide else ""}>
{body}
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def _colours() -> str:
    """Give what stands in a series' colour enough of the ink to be read as text."""
    rules = []
    for colour in dict.fromkeys(style.colour for style in STYLES.values()):
        red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
        text = f'.plot .annotation-text[style*="rgb({red}, {green}, {blue})"]'
        rules.append(f"{text}{{fill:color-mix(in srgb,{colour} 70%,var(--ink))!important}}")
    return "\n".join(rules)


def file(name: str) -> str:
    """Return the content of a file that comes with the package."""
    return (_HERE / name).read_text(encoding="utf-8")


def cell(content: str) -> str:
    """Return HTML as it is, and other text escaped."""
    return content if isinstance(content, Html) else escape(content)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> Html:
    """Return a table, which scrolls where it is too wide.

    Args:
        headings: What stands above the columns.
        rows: The cells, as text or `Html`.
        kind: Its class.
    """
    head = "".join(f"<th>{cell(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr>{''.join(f'<td>{cell(content)}</td>' for content in row)}</tr>" for row in rows
    )
    return Html(
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def badge(answer: str) -> Html:
    """Return a verdict as a label."""
    kind = answer.replace(" ", "-")
    return Html(f'<span class="verdict {escape(kind)}">{escape(answer)}</span>')


def checks(findings: Sequence[Finding]) -> Html:
    """Return the list of what the verdict came from."""
    items = "".join(
        f"<li>{sign(held)} <b>{escape(finding.part)}</b> {escape(what)}</li>"
        for finding in findings
        for what, held in finding.checks.items()
    )
    return Html(f'<p class="soft">{ALONE}:</p><ul class="checks">{items}</ul>' if items else "")
