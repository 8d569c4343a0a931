"""What `check` finds: a fault, with what shows it and what removes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

#: From what is wrong to what is only good to know.
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A fault, or what may be one.

    Attributes:
        code: Its name, always the same, as `"never_updated"`.
        severity: `"error"` where numbers are wrong, `"warning"` where they are likely to be worse
            than they could be, `"note"` for what is only good to know.
        layer: The layer's name in the model.
        evidence: What was measured, in numbers.
        cause: Why that is so, or what it leads to.
        fix: A line of code that removes it, where `model`, `data` and `optimizer` are what was
            checked.

    Example:
        >>> import batchnorm as bn
        >>> from torch import nn
        >>> [finding] = bn.check(nn.BatchNorm1d(3, momentum=0.99)).findings
        >>> finding.code, finding.severity, finding.fix
        ('momentum_convention', 'warning', 'model.momentum = 0.01')
    """

    code: str
    severity: Severity
    layer: str
    evidence: str
    cause: str
    fix: str


def spelled(model: nn.Module, name: str, root: str = "model") -> str:
    """Return a module as one writes it in Python, as `model.layer1[0].bn` for `layer1.0.bn`.

    Args:
        model: The model.
        name: The module's name in it.
        root: What the model is called.
    """
    written, module = root, model
    for part in name.split(".") if name else ():
        is_number = part.isdigit() and isinstance(module, nn.Sequential | nn.ModuleList)
        if not part.isidentifier() and not is_number:
            return f"{root}.get_submodule({name!r})"
        written += f".{part}" if part.isidentifier() else f"[{part}]"
        module = getattr(module, part)
    return written


def number(value: float) -> str:
    """Return a number in three digits."""
    return f"{value:.3g}"
