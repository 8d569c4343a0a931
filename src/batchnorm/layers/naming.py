"""Which layer of which model an error comes from."""

from __future__ import annotations

import sys

from torch import nn


def name_layer(error: Exception, layer: nn.Module) -> None:
    """Add to an error's message where in the model the layer is that raised it.

    Args:
        error: The error, changed in place.
        layer: The layer, in whose `forward` this is called.
    """
    message = error.args[0] if error.args else None
    if isinstance(message, str):
        error.args = (f"{message} [in {_qualified_name(layer)}]", *error.args[1:])


def _qualified_name(layer: nn.Module) -> str:
    """Return the layer's name in the outermost module whose `forward` is running.

    A layer does not know the model that it is part of, but the call stack does.
    """
    name = f"{type(layer).__name__}({layer.extra_repr()})"
    frame, found = sys._getframe(), name
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner is not layer:
            for path, module in owner.named_modules():
                if module is layer:
                    found = f"{path!r} of {type(owner).__name__}: {name}"
    return found
