"""The shape of a claim: what is said, what is run, what is measured, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from batchnorm.study.charts import Chart
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.tasks import Task

Answer = Literal["holds", "does not hold", "depends", "not measured"]


@dataclass(frozen=True)
class Finding:
    """What was measured with one network.

    Attributes:
        network: One of `NETWORKS`.
        sentence: What was found, in plain words.
        effect: The same, short enough for a table.
        cells: The value of each norm, in the claim's unit.
        holds: For each comparison that could be made, whether the claim holds in it.
        details: The numbers behind it, in rows under the claim's headings.
    """

    network: str
    sentence: str
    effect: str
    cells: Mapping[str, str] = field(default_factory=dict)
    holds: Sequence[bool] = ()
    details: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Claim:
    """One thing that is said of batch normalization; a module has one.

    Attributes:
        number: Its number in the notes; 0 for a check of the study's own.
        name: The name of its module.
        title: What is claimed, in a few words.
        says: What the notes say, and what others say of it.
        source: Where it is from.
        measured: How it is measured.
        rule: How the verdict comes from the numbers.
        unit: What the numbers in the table are.
        headings: What the columns of the details are.
        tasks: What must be done first.
        measure: Finds what there is to find, network by network.
        charts: Draws it.
    """

    number: int
    name: str
    title: str
    says: str
    source: str
    measured: str
    rule: str
    unit: str
    headings: Sequence[str]
    tasks: Callable[[Plan], Sequence[Task[Any]]]
    measure: Callable[[Plan, Store], Sequence[Finding]]
    charts: Callable[[Plan, Store], Sequence[Chart]]


@dataclass(frozen=True)
class Judgement:
    """What came of a claim."""

    claim: Claim
    findings: Sequence[Finding]
    charts: Sequence[Chart]

    @property
    def answer(self) -> Answer:
        """Whether the claim holds: in all comparisons, in none, or in some.

        Example:
            >>> findings = [Finding("conv", "", "", holds=[held]) for held in (True, False)]
            >>> Judgement(..., findings, []).answer
            'depends'
        """
        holds = {held for finding in self.findings for held in finding.holds}
        if not holds:
            return "not measured"
        if len(holds) == 2:
            return "depends"
        return "holds" if holds.pop() else "does not hold"
