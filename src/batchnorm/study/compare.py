"""Two studies side by side: a table for the terminal, and a page with the pictures of both."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from batchnorm.study.claims import Finding
from batchnorm.study.markup import Html, badge, cell, checks, document, table
from batchnorm.study.report import replace
from batchnorm.study.story import LEGEND, heading, mark
from batchnorm.study.summary import Summary, Verdict, read
from batchnorm.study.table import columns, title, verdict

_WIDTHS = (18, 28, 28)
_DIFFERS = "≠"
_NEITHER = "–"


@dataclass(frozen=True)
class Pair:
    """What two studies say of a claim; None where one does not speak of it."""

    a: Verdict | None
    b: Verdict | None

    @property
    def title(self) -> str:
        """What the claim is called."""
        one = self.a or self.b
        assert one is not None
        return heading(one.number, one.title)

    @property
    def answers(self) -> tuple[str, str]:
        """Whether it holds, in each."""
        a, b = (verdict.answer if verdict else _NEITHER for verdict in (self.a, self.b))
        return a, b

    @property
    def differs(self) -> bool:
        """Whether both speak of it, and say different things."""
        return _NEITHER not in self.answers and len(set(self.answers)) == 2

    def parts(self) -> Iterator[tuple[str, Finding | None, Finding | None]]:
        """Give each part of either, and what was found of it in each."""
        a, b = (
            {finding.part: finding for finding in verdict.findings} if verdict else {}
            for verdict in (self.a, self.b)
        )
        for part in {**a, **b}:
            yield part, a.get(part), b.get(part)


def compare(first: Path, second: Path, out: Path, *, console: Console) -> None:
    """Show two studies side by side, and write a page with the pictures of both.

    Args:
        first: The folder of a study.
        second: The folder of another one.
        out: The page.
        console: Where the table is shown.

    Raises:
        StudyError: One of the folders has no whole study.
    """
    a, b = read(first), read(second)
    pairs = _pairs(a, b)
    replace(out, _page(a, b, pairs))
    console.print(_terminal(a, b, pairs))
    console.print(f"Side by side, with pictures: {out}", markup=False, soft_wrap=True)


def _pairs(a: Summary, b: Summary) -> list[Pair]:
    """The claims of both, by their names, in the order of the first."""
    of_a, of_b = ({verdict.name: verdict for verdict in study.verdicts} for study in (a, b))
    return [Pair(of_a.get(name), of_b.get(name)) for name in {**of_a, **of_b}]


def _names(a: Summary, b: Summary) -> tuple[str, str]:
    """What each is called: its data, and its folder where that tells them apart."""
    told = [f"{study.data} ({study.folder.name or study.folder})" for study in (a, b)]
    return ("A: " + told[0], "B: " + told[1])


def _told(finding: Finding | None) -> str:
    """What was found of a part, in a few letters."""
    if finding is None:
        return _NEITHER
    return f"{mark(finding)} {finding.effect}" if finding.checks else "not measured"


def _terminal(a: Summary, b: Summary, pairs: list[Pair]) -> RenderableType:
    parts = [title("Two studies"), columns([("", *_names(a, b))], _WIDTHS, "ll", "dim")]
    for pair in pairs:
        parts += [
            verdict(pair.title, _DIFFERS * pair.differs),
            columns([("verdict", *pair.answers)], _WIDTHS, "ll", "bold"),
            columns([(p, _told(x), _told(y)) for p, x, y in pair.parts()], _WIDTHS, "ll"),
        ]
    return Group(*parts, Text(""), Text(_legend(pairs), style="dim"))


def _legend(pairs: list[Pair]) -> str:
    count = sum(pair.differs for pair in pairs)
    return f"{_DIFFERS} the verdicts differ: {count} of {len(pairs)}. {LEGEND}"


def _page(a: Summary, b: Summary, pairs: list[Pair]) -> str:
    names = _names(a, b)
    made_on = [
        (key, a.made_on.get(key, _NEITHER), b.made_on.get(key, _NEITHER))
        for key in {**a.made_on, **b.made_on}
    ]
    sections = "".join(_section(pair, place, names, a, b) for place, pair in enumerate(pairs))
    body = f"""<header>
<h1>Two studies</h1>
<p class="lead">{escape(names[0])}<br>{escape(names[1])}</p>
{_verdicts(pairs, names)}
</header>
<main>
{sections}
</main>
<footer>
<section>
<h2>What they were made on</h2>
{table(("", *names), [*made_on, ("command", a.command, b.command)], "made-on")}
</section>
</footer>"""
    return document(f"{names[0]}, {names[1]}", body, wide=True)


def _verdicts(pairs: list[Pair], names: tuple[str, str]) -> str:
    bodies = []
    for place, pair in enumerate(pairs):
        parts = list(pair.parts())
        a, b = (badge(answer) if answer != _NEITHER else _NEITHER for answer in pair.answers)
        rows = [
            f'<tr><td rowspan="{len(parts) + 1}"><a href="#claim-{place}">{escape(pair.title)}</a>'
            f"{_differs(pair)}</td>{_cells('', a, b)}</tr>"
        ]
        rows += [f"<tr>{_cells(part, _found(x), _found(y))}</tr>" for part, x, y in parts]
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("claim", "part", *names))
    return (
        '<div class="scroll" id="verdicts"><table class="verdicts pairs">'
        f"<thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div>"
        f'<p class="soft">{escape(_legend(pairs))}</p>'
    )


def _differs(pair: Pair) -> str:
    return f" <b>{_DIFFERS}</b>" * pair.differs


def _cells(part: str, a: str, b: str) -> str:
    return (
        f'<td class="part">{escape(part)}</td><td data-name="A">{cell(a)}</td>'
        f'<td data-name="B">{cell(b)}</td>'
    )


def _found(finding: Finding | None) -> Html:
    values = filter(None, (finding.without, finding.with_)) if finding else ()
    return Html(f"{escape(_told(finding))}<small>{escape(' → '.join(values))}</small>")


def _section(pair: Pair, place: int, names: tuple[str, str], a: Summary, b: Summary) -> str:
    return f"""<section id="claim-{place}">
<h2>{escape(pair.title)}{_differs(pair)}</h2>
<div class="beside">
{_side(names[0], pair.a, a.folder)}
{_side(names[1], pair.b, b.folder)}
</div>
<p class="back"><a href="#verdicts">Back to the table</a></p>
</section>
"""


def _side(name: str, verdict: Verdict | None, folder: Path) -> str:
    if verdict is None:
        nothing = '<p class="soft">This study does not speak of it.</p>'
        return f"<div><h3>{escape(name)}</h3>{nothing}</div>"
    found = "".join(f"<p>{escape(finding.sentence)}</p>" for finding in verdict.findings)
    figures = "".join(_figure(folder, file, caption) for file, caption in verdict.figures)
    return (
        f"<div><h3>{escape(name)} {badge(verdict.answer)}</h3>{found}{figures}"
        f"{checks(verdict.findings)}</div>"
    )


def _figure(folder: Path, file: str, caption: str) -> str:
    try:
        content = (folder / "figures" / f"{file}.png").read_bytes()
    except OSError:
        return f'<p class="soft">{escape(file)}: the picture is not there.</p>'
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    caption = escape(caption)
    return (
        f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )
