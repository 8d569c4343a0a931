"""What a tool says it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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
        names = ", ".join(name or "itself" for name in self.done)
        if len(names) > 60 and len(self.done) > 1:
            names = f"{self.done[0]} ... {self.done[-1]}"
        lines = [f"{len(self.done)} {self.verb}{': ' if names else ''}{names}"]
        lines += [f"  left {name or 'itself'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)
