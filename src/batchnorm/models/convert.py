"""Conversion: every batch norm of a model is one of ours, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from batchnorm.layers import BatchNorm
from batchnorm.models.adopt import (
    HALF_TYPES,
    LAZY,
    OURS,
    SETTINGS,
    become,
    dtype_of,
    group_of,
    let_go,
    memory_of,
    remember,
    stock_class,
)
from batchnorm.models.alike import Recipe, recipe_for
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms

_THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in OURS.items()}
#: What has to come before a layer can be reverted that another tool holds.
_FIRST = {
    "freeze": "it is frozen: unfreeze it first",
    "synchronize": "it is synchronized: unsynchronize it first",
    "unsynchronize": "unsynchronize made it local, which torch.nn.SyncBatchNorm cannot be",
    "transaction": "it is in a transaction: commit or roll back first",
}
_UNDO = {"statistics": "unfreeze", "update": "unfreeze", "process_group": "unsynchronize"}


@dataclass(repr=False)
class ConvertReport(Report):
    """Which layers were converted or reverted.

    Attributes:
        classes: Of each of them the class that is not ours: that it had, or has again.
    """

    verb: str = "converted"
    classes: dict[str, str] = field(default_factory=dict)

    @property
    def converted(self) -> list[str]:
        """The names of the layers whose class was changed, which is `done`."""
        return self.done

    def _details(self) -> Sequence[str]:
        counts = Counter(self.classes.values()).most_common()
        return ["  " + ", ".join(f"{n} {name}" for name, n in counts)] if counts else []


def convert(model: nn.Module, *, where: Where = None, dry_run: bool = False) -> ConvertReport:
    """Make the batch norms of a model ones of this package, until `revert`.

    The layers stay the same objects with the same parameters, which an optimizer may have; names,
    hooks, modes and the keys of the state dict stay, too. A lazy layer is converted by its first
    batch. A layer of another package, frozen or with an activation, is converted if a copy of it
    that is run with random numbers computes what one of this package does.

    Args:
        model: The model, or a layer itself, changed in place.
        where: Which layers; see `freeze`.
        dry_run: Whether to report only, and change nothing.

    Returns:
        What was converted, and what was left, with the reason.

    Raises:
        ValueError: `where` names no layer.

    Example:
        >>> import batchnorm as bn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> bn.convert(model)
        1 converted: 1
          1 BatchNorm2d
        >>> type(model[1])
        <class 'batchnorm.layers.batch_norm.BatchNorm2d'>
    """
    report = ConvertReport("to be converted" if dry_run else "converted")
    chosen: list[tuple[nn.Module, Recipe]] = []
    for name, layer in batch_norms(model, where, alike=True).items():
        recipe = _recipe_for(layer)
        if isinstance(recipe, str):
            report.left[name] = recipe
            continue
        chosen.append((layer, recipe))
        report.done.append(name)
        report.classes[name] = stock_class(layer).__name__
    with ExitStack() as undo:
        for layer, recipe in () if dry_run else chosen:
            undo.callback(let_go, layer, "convert")
            _convert(layer, recipe)
        undo.pop_all()
    return report


def revert(model: nn.Module, *, where: Where = None, dry_run: bool = False) -> ConvertReport:
    """Undo `convert`: every layer has its class and attributes again.

    Layers that were made as ones of this package become those of `torch.nn`, if they have nothing
    that those have not.

    Args:
        model: The model, or a layer itself, changed in place.
        where: Which layers; see `freeze`.
        dry_run: Whether to report only, and change nothing.

    Returns:
        What was reverted, and what was left, with the reason.

    Raises:
        ValueError: `where` names no layer.

    Example:
        >>> import batchnorm as bn
        >>> from torch import nn
        >>> model = nn.Sequential(bn.BatchNorm1d(8), bn.BatchNorm1d(8, activation="relu"))
        >>> bn.revert(model)
        1 reverted: 0
          1 BatchNorm1d
          left 1: its activation is 'relu', which BatchNorm1d of torch has not
        >>> type(model[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    report = ConvertReport("to be reverted" if dry_run else "reverted")
    for name, layer in batch_norms(model, where, alike=True).items():
        stock = _stock_of(layer)
        if isinstance(stock, str):
            report.left[name] = stock
            continue
        if not dry_run:
            _revert(layer, stock)
        report.done.append(name)
        report.classes[name] = stock.__name__
    return report


def _recipe_for(layer: nn.Module) -> Recipe | str:
    """Return what makes one of ours of a layer, or why it is left."""
    memory = memory_of(layer)
    if memory is not None and "convert" not in memory.holders:  # another tool holds it, so far
        return Recipe(memory.ours, {})
    if memory is not None or isinstance(layer, BatchNorm):
        return "it is one of batchnorm already"
    if isinstance(layer, ScriptModule):
        return "torch.jit compiled it"
    if "forward" in vars(layer):
        return "its forward was replaced, on the layer itself"
    if type(layer) in LAZY:
        ours = OURS[LAZY[type(layer)]]
        return Recipe(ours, {"cls_to_become": ours})
    if type(layer) in OURS:
        return Recipe(OURS[type(layer)], group_of(layer))
    return recipe_for(layer)


def _convert(layer: nn.Module, recipe: Recipe) -> None:
    memory = memory_of(layer)
    if memory is not None:
        memory.holders.add("convert")
    elif type(layer) in LAZY:
        remember(layer, LAZY[type(layer)], *recipe, "convert")
    else:
        become(layer, *recipe, "convert")


def _stock_of(layer: nn.Module) -> type[nn.Module] | str:
    """Return the class that a layer has without us, or why it stays what it is."""
    memory = memory_of(layer)
    if memory is None and not isinstance(layer, BatchNorm):
        return "it is none of batchnorm"
    for holder in sorted(memory.holders - {"convert"}) if memory else ():
        return _FIRST.get(holder, f"{holder} is running")
    stock = _THEIRS.get(type(layer)) if memory is None else memory.stock
    name = type(layer).__name__
    if stock is None:
        return f"torch.nn has no {name}"
    if not isinstance(layer, BatchNorm):  # a lazy one that waits for its first batch
        return stock
    if memory is not None and type(layer) is not memory.ours:
        return f"its class has become {name} since: undo that first"
    return _more_than(stock, layer) or stock


def _more_than(stock: type[nn.Module], layer: BatchNorm) -> str | None:
    """Return what a layer has that one of the class has not."""
    memory, known = memory_of(layer), dict[str, Any]()
    if layer.ledger is not None:
        return _FIRST["transaction"]
    if memory is not None:
        known = {name: kept.group for name, kept in memory.given.items()}
    elif issubclass(stock, nn.SyncBatchNorm):
        known = {"process_group": layer.process_group or "world"}
        if any(tensor.is_cpu for tensor in (*layer.parameters(), *layer.buffers())):
            return f"{_of(stock)} runs on no CPU"
    for setting in SETTINGS:
        value = getattr(layer, setting)
        if value != known.get(setting, getattr(BatchNorm, setting)):
            undo = _UNDO.get(setting) if value is not None else None
            first = f": {undo} it first" if undo else ""
            return f"its {setting} is {value!r}, which {_of(stock)} has not{first}"
    return None


def _of(stock: type[nn.Module]) -> str:
    return f"{stock.__name__} of {stock.__module__.partition('.')[0]}"


def _revert(layer: nn.Module, stock: type[nn.Module]) -> None:
    if memory_of(layer) is not None:
        let_go(layer, "convert")
        return
    assert isinstance(layer, BatchNorm)
    dtype, group = dtype_of(layer), layer.process_group
    for name, statistic in layer._running().items():
        if dtype in HALF_TYPES:  # beside which torch.nn wants no wider ones
            layer._buffers[name] = statistic.to(dtype)
    for name in (*SETTINGS, "_agreed"):
        layer.__dict__.pop(name, None)
    if issubclass(stock, nn.SyncBatchNorm):
        layer.process_group = None if group == "world" else group
    layer.__class__ = stock  # type: ignore[assignment]
