"""Layers of torch.nn that are ours for as long as a tool needs it.

Our layers are subclasses of theirs with the same parameters and buffers, and what is new has its
default in the class. So it takes no more than another class to make one of the other, in place:
the names, the hooks, the optimizer's parameters stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

_OURS: dict[type[_BatchNorm], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}

_MEMORY = "_adopted"
#: The tools that let go by themselves, of the layer and not of a copy made meanwhile.
_PASSING = frozenset({"transaction", "calibrate", "big_batch"})
_HALF_TYPES = (torch.float16, torch.bfloat16)
#: What tools set on a layer, beside that.
_SET = ("_agreed", "ledger", "on_small_batch", "pooled", "process_group", "statistics", "update")


@dataclass(frozen=True)
class Kept:
    """A process group, or none, that a copy of the layer shares: it can be neither copied nor made.

    Attributes:
        group: The group.
    """

    group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self


@dataclass
class _Memory:
    """What an adopted layer was.

    Attributes:
        stock: Its class.
        own: What it had set, of what tools set.
        holders: The tools that hold it.
        parameters: The type of its parameters, or None if it has none.
        statistics: The type of its running statistics, likewise.
    """

    stock: type[Any]
    own: dict[str, Kept]
    holders: set[str]
    parameters: torch.dtype | None
    statistics: torch.dtype | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "holders": self.holders - _PASSING}


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
            layer.__dict__[_MEMORY].holders.add(holder)
        return layer
    check_adoptable({name: layer})
    own: dict[str, Kept] = {}
    if isinstance(layer, nn.SyncBatchNorm):
        own = {"process_group": Kept(layer.process_group)}
        layer.process_group = layer.process_group or "world"
    mean = layer.running_mean
    layer.__dict__[_MEMORY] = _Memory(
        type(layer), own, {holder}, _dtype(layer), None if mean is None else mean.dtype
    )
    layer.__class__ = _OURS[type(layer)]
    assert isinstance(layer, BatchNorm)
    layer._widen_statistics()
    return layer


def check_adoptable(layers: Mapping[str, _BatchNorm]) -> None:
    """Raise TypeError, before anything is changed, unless all of them can be adopted.

    Args:
        layers: The layers, by their names in the model.
    """
    for name, layer in layers.items():
        if isinstance(layer, BatchNorm) or type(layer) in _OURS:
            continue
        if isinstance(layer, LazyModuleMixin):
            raise TypeError(
                f"{name!r} is a {type(layer).__name__} that no batch has run through: run one "
                "batch through it first, so that it knows its channels"
            )
        if is_parametrized(layer):
            raise TypeError(
                f"{name!r} is parametrized, which makes it a {type(layer).__name__}, of which what "
                "its forward does is not known: remove the parametrizations "
                "(torch.nn.utils.parametrize.remove_parametrizations), or leave it out by where="
            )
        raise TypeError(
            f"{name!r} is a {type(layer).__name__}, which is neither one of batchnorm nor "
            "exactly one of torch.nn, so what its forward does is not known: leave it out by "
            "where="
        )


@contextmanager
def held(layers: Mapping[str, _BatchNorm], holder: str) -> Iterator[dict[str, BatchNorm]]:
    """Yield the layers as ours; what a tool sets on them inside is what it was at the end.

    Args:
        layers: The layers, by their names in the model.
        holder: Which tool needs them.

    Raises:
        TypeError: A layer is of a class of which nobody knows what its forward does.
        RuntimeError: A layer is in a transaction.
    """
    for name, layer in layers.items():
        if isinstance(layer, BatchNorm) and layer.ledger is not None:
            raise RuntimeError(
                f"{name!r} is in a transaction already: commit or roll back that one first"
            )
    check_adoptable(layers)
    ours = {name: adopt(name, layer, holder) for name, layer in layers.items()}
    before = [
        {n: layer.__dict__[n] for n in _SET if n in layer.__dict__} for layer in ours.values()
    ]
    try:
        yield ours
    finally:
        for layer, settings in zip(ours.values(), before, strict=True):
            for name in _SET:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(settings)
            let_go(layer, holder)


def stock_class(layer: _BatchNorm) -> type[_BatchNorm]:
    """Return the class that the layer has when no tool holds it."""
    memory: _Memory | None = layer.__dict__.get(_MEMORY)
    return type(layer) if memory is None else memory.stock


def dtype_when_let_go(layer: BatchNorm) -> torch.dtype | None:
    """Return the type that the running statistics have when no tool holds the layer.

    Those of `torch.nn` need statistics of a half type beside parameters of one.
    """
    memory: _Memory | None = layer.__dict__.get(_MEMORY)
    now = None if layer.running_mean is None else layer.running_mean.dtype
    if memory is None or now is not torch.float32:
        return now
    parameters = _dtype(layer)
    expected = memory.statistics if parameters == memory.parameters else parameters
    return expected if expected in _HALF_TYPES else now


def _dtype(layer: _BatchNorm) -> torch.dtype | None:
    parameter = next(layer.parameters(), None)
    return None if parameter is None else parameter.dtype


def let_go(layer: BatchNorm, holder: str) -> None:
    """Make the layer what it was, if no other tool holds it."""
    memory: _Memory | None = layer.__dict__.get(_MEMORY)
    if memory is None:
        return
    memory.holders.discard(holder)
    if memory.holders:
        return
    dtype = dtype_when_let_go(layer)
    for name, statistic in layer._running().items():
        layer._buffers[name] = statistic.to(dtype)
    for name in (_MEMORY, *_SET):
        layer.__dict__.pop(name, None)
    layer.__dict__.update({name: kept.group for name, kept in memory.own.items()})
    layer.__class__ = memory.stock
