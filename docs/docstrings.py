"""Shapes the docstrings of the sources for the API pages.

The sources write examples as doctests, under `Example:` or in running text, and have sections of
their own, `Shape:` and `Source:`. On a page the first are to be code, and the second plain text.
"""

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

#: A doctest that stands in running text, up to the next empty line.
_DOCTEST = re.compile(r"^>>> .*\n(?:.+\n)*", re.MULTILINE)

#: A section that the page generator has no name for.
_OTHER_SECTION = re.compile(r"^(?P<title>Shape|Source):\n(?P<body>(?:    .*\n)+)", re.MULTILINE)


def shape(text: str) -> str:
    """Return a docstring with its sections as the page generator and Markdown know them."""
    text = re.sub(r"^Example:$", "Examples:", f"{text}\n", flags=re.MULTILINE)
    text = _OTHER_SECTION.sub(_titled, text)
    return _DOCTEST.sub(_fenced, text)


def _titled(found: re.Match[str]) -> str:
    return f"**{found['title']}:**\n\n{dedent(found['body'])}"


def _fenced(found: re.Match[str]) -> str:
    return f"```pycon\n{found[0]}```\n"


class Docstrings(Extension):
    """Does so for every object that is documented."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Shape an object's docstring once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = shape(obj.docstring.value)
