"""The shape of a claim: what is said, what is run, what is measured, and how it is judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from batchnorm.study.charts import Chart
from batchnorm.study.interval import Interval
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.tasks import Task

_LONGEST = 80  # letters of a file's name, which no system cuts off
Answer = Literal["holds", "does not hold", "depends", "not measured"]


@dataclass(frozen=True)
class Row:
    """What was measured under one condition, seed by seed.

    Attributes:
        condition: What sets it apart, such as `plain` or `batchnorm`.
        measure: What was measured, with its unit.
        values: One for each seed, or for each repetition.
        effect: How it compares with another condition, where that is told.
    """

    condition: str
    measure: str
    values: Sequence[float]
    effect: Interval | None = None


@dataclass(frozen=True)
class Finding:
    """What was measured with one network.

    Attributes:
        part: The network, or whatever else of the claim's `parts`.
        sentence: What was found, in plain words.
        effect: The same, short enough for a table.
        without: What the effect goes from, for the table: the value without batch normalization,
            where the claim's unit says nothing else.
        with_: What it goes to: the value with it.
        checks: By what is asked, in a few words that hold where it is true: whether it is. The
            verdict comes from these alone.
        rows: The numbers behind it.
    """

    part: str
    sentence: str
    effect: str = ""
    without: str = ""
    with_: str = ""
    checks: Mapping[str, bool] = field(default_factory=dict)
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class Claim:
    """One thing that is said of batch normalization; a module has one, and calls it `CLAIM`.

    Attributes:
        number: Its number in the notes; 0 for what is not in them.
        name: A name for links and files: at most 40 letters, digits and underscores.
        title: What is claimed, in a few words.
        says: What the notes say, and what the literature says for it and against it.
        source: Where it is from.
        measured: How it is measured.
        rule: How the verdict comes from the numbers.
        unit: What the numbers in the table of verdicts are.
        parts: What is measured one by one, mostly networks, the most important one first. Where
            time is short, the last ones are left out.
        tasks: Returns what must be done first, for a part.
        measure: Returns what was found, for a part.
        charts: Draws it, for the parts that were measured.
        any_network: Whether a part may be any network, so that a user's own are measured as well.
    """

    number: int
    name: str
    title: str
    says: str
    source: str
    measured: str
    rule: str
    unit: str
    parts: Sequence[str]
    tasks: Callable[[Plan, str], Sequence[Task[Any]]]
    measure: Callable[[Plan, str, Store], Finding]
    charts: Callable[[Plan, Sequence[str], Store], Sequence[Chart]]
    any_network: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w{1,40}", self.name, re.ASCII):
            raise ValueError(
                f"the claim's name {self.name!r:.60}: expected at most 40 letters, digits and "
                "underscores"
            )
        for what in ("title", "says", "source", "measured", "rule", "unit"):
            if not isinstance(getattr(self, what), str):
                raise TypeError(f"the claim {self.name}: its {what} is no text")

    @property
    def key(self) -> str:
        """What a command line calls it: its number, or its name if it has none."""
        return str(self.number) if self.number else self.name


@dataclass(frozen=True)
class Judgement:
    """What came of a claim.

    Attributes:
        claim: The claim.
        findings: Part by part.
        charts: The pictures.
        left_out: The parts that there was no time for.
    """

    claim: Claim
    findings: Sequence[Finding]
    charts: Sequence[Chart]
    left_out: Sequence[str] = ()

    @property
    def answer(self) -> Answer:
        """Whether the claim holds: by all checks, by none, or by some.

        Example:
            >>> findings = [Finding("conv", "", checks={"faster": held}) for held in (True, False)]
            >>> Judgement(..., findings, []).answer
            'depends'
        """
        held = {held for finding in self.findings for held in finding.checks.values()}
        if not held:
            return "not measured"
        if len(held) == 2:
            return "depends"
        return "holds" if held.pop() else "does not hold"

    @property
    def figures(self) -> dict[str, Chart]:
        """The charts by the names of their files, without a suffix; no two have the same."""
        named: dict[str, Chart] = {}
        for chart in self.charts:
            whole = re.sub(r"[^\w-]+", "-", f"{self.claim.name}-{chart.name}", flags=re.ASCII)
            name, place = whole[:_LONGEST].strip("-"), 1
            while name in named:
                place += 1
                name = f"{whole[: _LONGEST - 4]}-{place}"
            named[name] = chart
        return named
