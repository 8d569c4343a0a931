"""What a report tells, in whichever form it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchnorm.study.claims import Judgement

LEGEND = (
    "In brackets: the 95% interval over the seeds. For an epoch: torch.nn, then batchnorm, both "
    "against plain."
)


@dataclass(frozen=True)
class Story:
    """What came of a study.

    Attributes:
        name: The data set's name; it may hold anything.
        judgements: What came of each claim.
        lead: What was done, in a sentence or two.
        broken_off: The runs that broke off, with the reason of each.
        made_on: The hardware and the versions.
        command: What does all of it again.
    """

    name: str
    judgements: Sequence[Judgement]
    lead: str
    broken_off: Mapping[str, str]
    made_on: Mapping[str, str]
    command: str

    @property
    def question(self) -> str:
        """What it answers."""
        return f"What did batch normalization do on {self.name}?"
