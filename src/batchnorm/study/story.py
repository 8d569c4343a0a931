"""What a report tells, in whichever form it is written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from batchnorm.study.claims import Claim, Finding, Judgement
from batchnorm.study.interval import short

LEGEND = (
    "✓ all checks of this part hold, ~ some, ✗ none. From: without batch normalization, to: with "
    "it, where the claim says nothing else. In brackets: the 95% interval over the seeds."
)
COLUMNS = ("from", "to", "effect")
ALONE = "The verdict comes from these checks alone"


@dataclass(frozen=True)
class Story:
    """What came of a study.

    Attributes:
        name: The data set's name; it may hold anything.
        judgements: What came of each claim.
        lead: What was done, in a sentence or two.
        broken_off: The runs that broke off, with the reason of each.
        made_on: The hardware and the versions.
        command: What does a study of the same data, as its words.
        whole: What must be added to do all of this study again.
    """

    name: str
    judgements: Sequence[Judgement]
    lead: str
    broken_off: Mapping[str, str]
    made_on: Mapping[str, str]
    command: Sequence[str]
    whole: Sequence[str] = ()

    @property
    def question(self) -> str:
        """What it answers."""
        return f"What did batch normalization do on {self.name}?"

    @property
    def left_out(self) -> str:
        """How much there was no time for, in a sentence; empty if nothing was left out."""
        parts = sum(len(judgement.left_out) for judgement in self.judgements)
        every = parts + sum(len(judgement.findings) for judgement in self.judgements)
        if not parts:
            return ""
        return f"{parts} of {every} parts were left out for time; the report names them."

    def repeating(self, claim: Claim | None = None) -> str:
        """Return the command line that does all of it again, or one claim with all its parts.

        One claim is done in a folder of its own, and so from the start.
        """
        if claim is None or "--paper" in self.command:
            return shlex.join([*self.command, *self.whole])
        only = ["--claims", claim.key, "--budget", "full", "--out", f"study-{claim.key}"]
        return shlex.join([*self.command, *only])


def heading(number: int, title: str) -> str:
    """Return what a claim is called, with its number in the notes if it has one.

    Example:
        >>> heading(3, "Higher learning rates"), heading(0, "The same numbers")
        ('3. Higher learning rates', 'The same numbers')
    """
    return f"{number}. {title}" if number else title


def lines(findings: Sequence[Finding]) -> list[tuple[str, str, str, str]]:
    """Return a claim's lines in the table of verdicts.

    Returns:
        For each part: its name, marked by what came of its checks; without, with, effect.
    """
    told = [
        (
            f"{mark(f)} {f.part}".strip(),
            f.without,
            f.with_,
            f.effect if f.checks else "not measured",
        )
        for f in findings
    ]
    return told or [("", "", "", "left out for time")]


def mark(finding: Finding) -> str:
    """Return a sign for all checks, some, or none; empty where nothing was measured.

    Example:
        >>> mark(Finding("conv", "", checks={"faster": True, "better": False}))
        '~'
    """
    held = set(finding.checks.values())
    return "~" if len(held) == 2 else "".join(sign(held) for held in held)


def sign(held: bool) -> str:
    """Return the sign of one check."""
    return "✓" if held else "✗"


def left_out(judgement: Judgement) -> str:
    """Return the sentence that names what there was no time for, or nothing."""
    if not judgement.left_out:
        return ""
    return f"Left out for time: {', '.join(judgement.left_out)}. The command below does them, too."


def median(values: Sequence[float]) -> str:
    """Return the value in the middle, as text."""
    return short(float(np.median(values))) if len(values) else ""


def each(values: Sequence[float]) -> str:
    """Return all values, as text."""
    return ", ".join(map(short, values))
