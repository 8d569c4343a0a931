"""Layers of torch.nn, and of other packages, that are ours for as long as a tool needs it.

Our layers are subclasses of those of torch.nn with the same parameters and buffers, and what is new
has its default in the class. So it takes no more than another class to make one of the other, in
place: the names, the hooks, the optimizer's parameters stay what they are. A layer of another
package is given some attributes, too.
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

#: What a layer of torch.nn becomes.
OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}

#: The settings that torch.nn has not; their defaults are in the class.
SETTINGS = (
    "channel_dim", "activation", "correction", "on_small_batch", "inplace", "ghost_size",
    "process_group", "statistics", "update",
)  # fmt: skip

#: The layers of torch.nn that get another class, themselves, when they know their channels.
LAZY: dict[type[nn.Module], type[nn.Module]] = {
    nn.LazyBatchNorm1d: nn.BatchNorm1d,
    nn.LazyBatchNorm2d: nn.BatchNorm2d,
    nn.LazyBatchNorm3d: nn.BatchNorm3d,
}

_MEMORY = "_adopted"
#: The tools that let go by themselves, of the layer and not of a copy made meanwhile.
_PASSING = frozenset({"transaction", "calibrate", "big_batch"})
HALF_TYPES = (torch.float16, torch.bfloat16)
#: What tools set on a layer, beside that.
_SET = ("_agreed", "ledger", "on_small_batch", "pooled", "process_group", "statistics", "update")


@dataclass(frozen=True)
class Kept:
    """A process group, or none, that a copy of the layer shares: it can be neither copied nor made.

    Attributes:
        group: The group; or the value of another attribute.
    """

    group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self


@dataclass
class Memory:
    """What an adopted layer was.

    Attributes:
        stock: Its class.
        ours: The class that it has meanwhile; a lazy layer, once it knows its channels.
        given: The attributes that it was given.
        own: What it had in their place.
        buffers: The names of its buffers.
        holders: The tools that hold it.
        parameters: The type of its weight and bias, or None if it has none.
        statistics: The type of its running statistics, likewise.
    """

    stock: type[Any]
    ours: type[BatchNorm]
    given: dict[str, Kept]
    own: dict[str, Kept]
    buffers: tuple[str, ...]
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
    memory = memory_of(layer)
    if isinstance(layer, BatchNorm):
        if memory is not None:
            memory.holders.add(holder)
        return layer
    check_adoptable({name: layer})
    return become(layer, OURS[type(layer)], group_of(layer), holder)


def group_of(layer: nn.Module) -> dict[str, Any]:
    """Return the process group that a layer of torch.nn has as one of ours, as an attribute."""
    if not isinstance(layer, nn.SyncBatchNorm):
        return {}
    return {"process_group": layer.process_group or "world"}


def become(
    layer: nn.Module, ours: type[BatchNorm], given: Mapping[str, Any], holder: str
) -> BatchNorm:
    """Return a layer of whatever class as one of ours, which it is from now on.

    Args:
        layer: The layer, changed in place.
        ours: The class that it becomes.
        given: The attributes that it has as one of ours.
        holder: Which tool needs it.
    """
    names = (*SETTINGS, *_SET, "ranks")  # another meaning of such a name is not ours
    defaults = {name: getattr(BatchNorm, name) for name in names if name in layer.__dict__}
    remember(layer, type(layer), ours, {**defaults, **given}, holder)
    layer._buffers.setdefault("num_batches_tracked", None)
    layer.__class__ = ours
    assert isinstance(layer, BatchNorm)
    layer._widen_statistics()
    return layer


def remember(
    layer: nn.Module,
    stock: type[Any],
    ours: type[BatchNorm],
    given: Mapping[str, Any],
    holder: str,
) -> Memory:
    """Give a layer attributes, and return the memory of what it was.

    Args:
        layer: The layer, changed in place.
        stock: The class that it will have when it is let go.
        ours: The class that it has until then.
        given: The attributes that it has until then.
        holder: Which tool needs it.
    """
    mean = layer._buffers.get("running_mean")
    memory = Memory(
        stock,
        ours,
        {name: Kept(value) for name, value in given.items()},
        {name: Kept(layer.__dict__[name]) for name in given if name in layer.__dict__},
        tuple(layer._buffers),
        {holder},
        dtype_of(layer),
        None if mean is None else mean.dtype,
    )
    layer.__dict__.update({_MEMORY: memory, **given})
    return memory


def memory_of(layer: nn.Module) -> Memory | None:
    """Return what an adopted layer was; None of a layer that is what it was made as."""
    found: Memory | None = layer.__dict__.get(_MEMORY)
    return found


def check_adoptable(layers: Mapping[str, _BatchNorm]) -> None:
    """Raise TypeError, before anything is changed, unless all of them can be adopted.

    Args:
        layers: The layers, by their names in the model.
    """
    for name, layer in layers.items():
        if isinstance(layer, BatchNorm) or type(layer) in OURS:
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


def stock_class(layer: nn.Module) -> type[Any]:
    """Return the class that the layer has when no tool holds it."""
    memory = memory_of(layer)
    return type(layer) if memory is None else memory.stock


def dtype_when_let_go(layer: BatchNorm) -> torch.dtype | None:
    """Return the type that the running statistics have when no tool holds the layer.

    Those of `torch.nn` need statistics of a half type beside parameters of one.
    """
    memory = memory_of(layer)
    now = None if layer.running_mean is None else layer.running_mean.dtype
    if memory is None or now is not torch.float32:
        return now
    parameters = dtype_of(layer)
    expected = memory.statistics if parameters == memory.parameters else parameters
    return expected if expected in HALF_TYPES else now


def dtype_of(layer: nn.Module) -> torch.dtype | None:
    """Return the type of a layer's weight and bias, which may be buffers; None if it has none."""
    tensors = (*layer.parameters(), *(layer._buffers.get(name) for name in ("weight", "bias")))
    return next((tensor.dtype for tensor in tensors if tensor is not None), None)


def let_go(layer: nn.Module, holder: str) -> None:
    """Make the layer what it was, if no other tool holds it.

    One whose class something else has changed meanwhile, as a parametrization does, stays ours.
    """
    memory = memory_of(layer)
    if memory is None:
        return
    memory.holders.discard(holder)
    if memory.holders or type(layer) not in (memory.ours, *LAZY):
        return
    if isinstance(layer, BatchNorm):
        dtype = dtype_when_let_go(layer)
        for name, statistic in layer._running().items():
            layer._buffers[name] = statistic.to(dtype)
        layer.__class__ = memory.stock
    if "num_batches_tracked" not in memory.buffers:
        layer._buffers.pop("num_batches_tracked", None)
    for name in (_MEMORY, *_SET, *memory.given):
        layer.__dict__.pop(name, None)
    layer.__dict__.update({name: kept.group for name, kept in memory.own.items()})
