"""Which layers of a program may be folded, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from batchnorm.models.walk import Where


def chosen(names: Sequence[str], where: Where) -> list[str]:
    """Return the names of a program's layers that match.

    Args:
        names: All of them.
        where: A pattern, or several; None for all.

    Raises:
        TypeError: It is a function, which would be asked about modules.
        ValueError: A pattern matches none.
    """
    if where is None:
        return list(names)
    if callable(where):
        raise TypeError("where is a function of modules, and a program has none: pass patterns")
    patterns = [where] if isinstance(where, str) else list(where)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"where has {pattern!r}, which is the name of no batch norm of this program; it "
                f"has {', '.join(map(repr, names)) or 'none'}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
