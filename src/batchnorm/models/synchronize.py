"""Synchronizing the batch norms of a model over processes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from batchnorm.layers import BatchNorm
from batchnorm.models.adopt import Kept, adopt, check_adoptable, let_go, stock_class
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BEFORE = "_before_synchronizing"


def synchronize(
    model: nn.Module,
    process_group: ProcessGroup | Literal["world"] = "world",
    *,
    where: Where = None,
) -> Report:
    """Let the batch norms of a model normalize by the moments over a group of processes.

    The layers stay the same objects, with their parameters, buffers, hooks, eps and momentum; see
    `SyncBatchNorm` for what they do then. It can be called before `torch.distributed` is
    initialized, and on the CPU.

    Args:
        model: The model, changed in place.
        process_group: The processes; the default group if left out.
        where: Which layers; see `freeze`.

    Returns:
        What was synchronized.

    Raises:
        ValueError: `where` names no layer.
        TypeError: A layer is of a class of which nobody knows what its forward does.

    Example:
        >>> import batchnorm as bn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> bn.synchronize(model)
        1 synchronized: 1
        >>> bn.unsynchronize(model)
        1 local: 1
        >>> type(model[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    report, layers = Report("synchronized"), batch_norms(model, where)
    check_adoptable(layers)
    for name, layer in layers.items():
        ours = adopt(name, layer, "synchronize")
        ours.__dict__.setdefault(_BEFORE, Kept(ours.process_group))
        ours.process_group = process_group
        ours.__dict__.pop("_agreed", None)  # the processes are others
        report.done.append(name)
    return report


def unsynchronize(model: nn.Module, *, where: Where = None) -> Report:
    """Undo `synchronize`, and make the batch norms local that are synchronized without it.

    A layer that `synchronize` was called for is what it was before, with the process group that it
    had, if it had one; a second call makes such a layer local. Layers that were made as
    `SyncBatchNorm`, ours or that of `torch.nn`, and that it was not called for, become local: ours
    by its setting, and that of `torch.nn`, which has no such setting, by becoming one of ours.

    Args:
        model: The model, changed in place.
        where: Which layers; see `freeze`.

    Returns:
        What is local now, and what was left, with the reason: it was local before, or it has its
        first process group again.

    Raises:
        ValueError: `where` names no layer.
        TypeError: A layer is of a subclass of `torch.nn.SyncBatchNorm`.

    Example:
        >>> import batchnorm as bn
        >>> layer = bn.SyncBatchNorm(3)
        >>> bn.unsynchronize(layer), layer.process_group
        (1 local: itself, None)
    """
    report, layers = Report("local"), batch_norms(model, where)
    theirs = {n: m for n, m in layers.items() if issubclass(stock_class(m), nn.SyncBatchNorm)}
    check_adoptable(theirs)
    for name, found in layers.items():
        layer = found
        before = found.__dict__.pop(_BEFORE, None)
        if name in theirs and before is None:  # let go, it would be synchronized again
            layer = adopt(name, found, "unsynchronize")
        if not isinstance(layer, BatchNorm) or layer.process_group is None:
            report.left[name] = "it was local"
            continue
        layer.process_group = None if before is None else before.group
        layer.__dict__.pop("_agreed", None)
        if layer.process_group is None:
            report.done.append(name)
        else:
            report.left[name] = "it has the process group again that it had before synchronize"
        let_go(layer, "synchronize")
    return report
