"""Layers of torch.nn that are ours for as long as a tool needs it.

Our layers are subclasses of theirs with the same parameters and buffers, and what is new has its
default in the class. So it takes no more than another class to make one of the other, in place:
the names, the hooks, the optimizer's parameters stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

_OURS: dict[type[_BatchNorm], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}

#: What an adopted layer remembers: its class, its process group, and which tools hold it.
_MEMORY = "_adopted"
#: What tools set on a layer, beside that.
_SET = ("_agreed", "ledger", "on_small_batch", "pooled", "process_group", "statistics", "update")


def adopt(name: str, layer: _BatchNorm, holder: str) -> BatchNorm:
    """Return the layer as one of ours, which it is from now on, until its holders let it go.

    Args:
        name: Its name in the model.
        layer: The layer, changed in place if it is one of `torch.nn`.
        holder: Which tool needs it.

    Raises:
        TypeError: It is a subclass of which nobody knows what its forward does.
    """
    if isinstance(layer, BatchNorm):
        if _MEMORY in layer.__dict__:
            layer.__dict__[_MEMORY][2].add(holder)
        return layer
    check_adoptable({name: layer})
    own: dict[str, Any] = {}
    if isinstance(layer, nn.SyncBatchNorm):
        own = {"process_group": layer.process_group}
        layer.process_group = layer.process_group or "world"
    layer.__dict__[_MEMORY] = type(layer), own, {holder}
    layer.__class__ = _OURS[type(layer)]
    assert isinstance(layer, BatchNorm)
    return layer


def check_adoptable(layers: Mapping[str, _BatchNorm]) -> None:
    """Raise TypeError, before anything is changed, unless all of them can be adopted.

    Args:
        layers: The layers, by their names in the model.
    """
    for name, layer in layers.items():
        if not isinstance(layer, BatchNorm) and type(layer) not in _OURS:
            raise TypeError(
                f"{name!r} is a {type(layer).__name__}, which is neither one of batchnorm nor "
                "exactly one of torch.nn, so what its forward does is not known: leave it out by "
                "where="
            )


def stock_class(layer: _BatchNorm) -> type[_BatchNorm]:
    """Return the class that the layer has when no tool holds it."""
    stock: type[_BatchNorm] = layer.__dict__.get(_MEMORY, (type(layer),))[0]
    return stock


def let_go(layer: BatchNorm, holder: str) -> None:
    """Make the layer what it was, if no other tool holds it."""
    stock, own, holders = layer.__dict__.get(_MEMORY, (None, {}, {holder}))
    holders.discard(holder)
    if stock is None or holders:
        return
    for name in (_MEMORY, *_SET):
        layer.__dict__.pop(name, None)
    layer.__dict__.update(own)
    layer.__class__ = stock
