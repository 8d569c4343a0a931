"""What a tool says it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any


@dataclass
class Report:
    """The layers that a tool changed, and those it left alone.

    Attributes:
        verb: What was done, as a participle.
        done: The names of the layers that were changed, in the order of the model.
        left: The names of the others that were asked for, each with the reason.
    """

    verb: str = "changed"
    done: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self)

    def __repr__(self) -> str:
        names = ": " + _listed(self.done) if self.done else ""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines = [f"{len(self.done)} {self.verb}{names}", *self._details()]
        for reason, left in by_reason.items():
            count = f" ({len(left)})" if len(left) > 1 else ""
            lines.append(f"  left {_listed(left)}{count}: {reason}")
        return "\n".join(
            fill(line, 80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
            for line in lines
        )

    def _details(self) -> Sequence[str]:
        """Return what else there is to say of what was done, a line each."""
        return ()


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(name or "itself" for name in names)
    if len(listed) > 60 and len(names) > 1:
        return f"{names[0] or 'itself'} ... {names[-1]}"
    return listed
