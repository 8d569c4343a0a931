"""The one walk over a model: which batch norms it has, under which names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

#: Which layers: all; those whose name matches a pattern, as "layer4.*", or one of several; or those
#: of which a function of the name and the layer says so.
Where = str | Iterable[str] | Callable[[str, Any], bool] | None


@overload
def batch_norms(model: nn.Module, where: Where = None) -> dict[str, _BatchNorm]: ...
@overload
def batch_norms(model: nn.Module, where: Where = None, *, alike: bool) -> dict[str, nn.Module]: ...
def batch_norms(
    model: nn.Module, where: Where = None, *, alike: bool = False
) -> Mapping[str, nn.Module]:
    """Return the batch norms of a model, ours and those of `torch.nn`, each under its first name.

    Args:
        model: The model, or a layer itself, whose name is then empty.
        where: Which of them.
        alike: Whether modules of other classes count that have running statistics as buffers, by
            the names that `torch.nn` gives them. What these do is not known.

    Raises:
        ValueError: `where`, or a pattern in it, names none.

    Example:
        >>> import batchnorm as bn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 5), bn.BatchNorm(5), nn.BatchNorm1d(5))
        >>> list(batch_norms(model)), list(batch_norms(model, "1"))
        (['1', '2'], ['1'])
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or (alike and _is_alike(module))
    }
    if where is None:
        return found
    if callable(where):
        chosen = {name: layer for name, layer in found.items() if where(name, layer)}
        what = "is a function that chooses"
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        what = "is empty and names"
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ValueError(
                    f"where has {pattern!r}, which is the name of no batch norm of this "
                    f"{type(model).__name__}; it has {', '.join(map(repr, found)) or 'none'}"
                )
        chosen = {
            name: layer
            for name, layer in found.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
    if not chosen:
        raise ValueError(
            f"where {what} no batch norm of this {type(model).__name__}; it has "
            f"{', '.join(map(repr, found)) or 'none'}: leave where out for all of them"
        )
    return chosen


def _is_alike(module: nn.Module) -> bool:
    """Return whether a module has what a batch norm keeps; instance norm has it, too."""
    return not isinstance(module, _InstanceNorm) and all(
        name in module._buffers and module._buffers[name] is not None
        for name in ("running_mean", "running_var")
    )
