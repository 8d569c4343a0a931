"""The frame of the pages on a model and data, and what stands in it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from batchnorm.environment import describe
from batchnorm.study.errors import printable
from batchnorm.study.markup import Html, document

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def framed(
    verdict: str,
    lead: str,
    numbers: str,
    main: str,
    reading: Sequence[str],
    *,
    model: object,
    data: str,
) -> str:
    """Return a page: whole, without scripts, and loading nothing.

    Args:
        verdict: Its heading.
        lead: What that means.
        numbers: The numbers that it is of.
        main: The sections that follow, as HTML.
        reading: How to read them, a text for each paragraph.
        model: What is called the model.
        data: What the data are called.
    """
    named = {"model": str(model), "data": data, **describe()}
    made_on = "".join(f"<dt>{text(name)}</dt><dd>{text(v)}</dd>" for name, v in named.items())
    body = f"""<header>
<h1>{text(verdict)}</h1>
<p class="lead">{text(lead)}</p>
<p class="soft">{text(data)}, seen by {text(str(model))}: {text(numbers)}.</p>
</header>
<main>
{main}
<section>
<h2>How to read it</h2>
{"".join(f"<p>{escape(paragraph)}</p>" for paragraph in reading)}
</section>
</main>
<footer><section><h2>What this was made on</h2><dl>{made_on}</dl></section></footer>
"""
    return document(f"{verdict}: {printable(data)}", body)


def text(words: str) -> Html:
    """Return a text, of which every sign can be seen."""
    return Html(escape(printable(words)))


def code(words: str) -> Html:
    """Return a text in which what stands between backquotes is code."""
    parts = text(words).split("`")
    return Html("".join(f"<code>{p}</code>" if at % 2 else p for at, p in enumerate(parts)))


def picture(plot: Callable[[], Figure], told: str) -> str:
    """Return a figure as SVG that stands in a page.

    Args:
        plot: Draws it.
        told: What it shows, for who cannot see it.
    """
    from matplotlib import rc_context

    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    content = io.StringIO()
    with rc_context({"svg.hashsalt": "batchnorm"}), warnings.catch_warnings():
        # A sign that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        plot().savefig(content, format="svg", metadata=nothing, bbox_inches="tight")
    _, _, drawn = content.getvalue().partition("<svg ")
    role = f'role="img" aria-label="{escape(told)}"'
    return f'<svg {role} style="max-width:100%;height:auto" {drawn}'
