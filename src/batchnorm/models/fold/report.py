"""What folding says it did."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class FoldReport:
    """The batch norms that were folded, those that were left, and the error of it.

    Attributes:
        folded: For each batch norm that is gone, the layers that took it in.
        left: For each other one, why it stays.
        max_error: The largest difference to the model before, relative to the largest value of the
            output that it is in; None if it was not measured.
        tol: How large it may be; likewise.
    """

    folded: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    max_error: float | None = None
    tol: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self)

    def __repr__(self) -> str:
        error = "not verified"
        if self.max_error is not None and self.tol is not None:
            error = f"largest error {self.max_error:.1e} (tol {self.tol:.0e})"
        lines = [f"{len(self.folded)} folded, {len(self.left)} left, {error}"]
        for name, into in self.folded.items():
            parent = name.rpartition(".")[0]
            short = (n.removeprefix(parent) if parent else n for n in into)
            lines.append(f"  {name or 'itself'} -> {', '.join(short)}")
        lines += [f"  left {name or 'itself'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(
            part for line in lines for part in textwrap.wrap(line, 80, subsequent_indent="    ")
        )
