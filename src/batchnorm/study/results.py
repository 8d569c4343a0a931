"""The numbers as CSV, for whoever goes on with them: every value, and every effect."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from batchnorm.study.claims import Judgement, Row

_WHERE = ("claim", "name", "part", "condition", "measure")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a spreadsheet would compute begins so


def values(judgements: Sequence[Judgement]) -> str:
    """Return a line for each value.

    Args:
        judgements: What came of the claims.

    Returns:
        CSV whose `index` counts the seeds, or the repetitions, from 0.
    """
    return _csv(
        (*_WHERE, "index", "value"),
        (
            (*where, index, value)
            for where, row in _rows(judgements)
            for index, value in enumerate(row.values)
        ),
    )


def effects(judgements: Sequence[Judgement]) -> str:
    """Return a line for each effect, with the ends of its 95% interval.

    Args:
        judgements: What came of the claims.

    Returns:
        CSV that begins with the columns of `values`, by which the two can be joined.
    """
    return _csv(
        (*_WHERE, "effect", "low", "high", "unit"),
        (
            (*where, row.effect.value, row.effect.low, row.effect.high, row.effect.unit.strip())
            for where, row in _rows(judgements)
            if row.effect is not None
        ),
    )


def _rows(judgements: Sequence[Judgement]) -> Iterator[tuple[tuple[str | float, ...], Row]]:
    for judgement in judgements:
        claim = judgement.claim
        for finding in judgement.findings:
            for row in finding.rows:
                where = claim.number, claim.name, finding.part, row.condition, row.measure
                yield where, row


def _csv(headings: Sequence[str], lines: Iterable[Sequence[str | float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([_cell(value) for value in line] for line in lines)
    return text.getvalue()


def _cell(value: str | float) -> str:
    """Write a number with its digits, and a text so that it stays a text."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return f"{value:.10g}"
