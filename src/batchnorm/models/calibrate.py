"""Calibration: the running statistics as the exact moments of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import Plain, Synchronized, Tracked, agree, synchronized
from batchnorm.layers import BatchNorm, BatchRenorm, Ledger
from batchnorm.models.adopt import dtype_when_let_go, held
from batchnorm.models.batches import (
    CallModel,
    Modes,
    call_with,
    limited,
    progress_bar,
    uncompiled,
)
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(repr=False)
class CalibrationReport(Report):
    """Which layers were calibrated.

    Attributes:
        batches: The number of batches that the model was called with, in one pass.
    """

    batches: int = 0

    verb: str = "calibrated"


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    call: CallModel | None = None,
    max_batches: int | None = None,
    process_group: ProcessGroup | Literal["world"] | None = None,
    sequential: bool = False,
    where: Where = None,
    progress: bool = True,
) -> CalibrationReport:
    """Set the running statistics to the moments of a data set: of all its values, not of batches.

        running_mean = mean over all values        running_var = m2 / (count - 1)

    Moments of batches merge exactly, so what lies between batches is in the variance, and the same
    data give the same moments however they are split. The running average that training leaves
    behind follows the last batches only, and those of a network that has moved since; so calibrate
    after averaging weights (EMA, SWA), quantizing, pruning, or before a comparison that matters.

    Only the batch norms are in the mode of the batch; all else is in evaluation, dropout too, and
    no gradient is recorded. With `sequential=False` there is one pass, in which each layer is
    normalized by the moments of its batch, as in training: what a deeper layer sees then depends on
    how the data are split. With `sequential=True` the layers are calibrated one after the other,
    each on what it will see in evaluation; that takes one pass more than there are layers, and no
    moment of any layer depends on the split.

    `num_batches_tracked` becomes the number of batches that a layer saw, but for a `BatchRenorm`,
    whose schedule goes by it. A model that was compiled runs as it was written.

    Nothing changes until the end, and whatever happens, an error or Ctrl-C too, every mode and
    setting is restored.

    Args:
        model: The model, changed in place.
        data: The batches, any iterable; see `call`. A tensor is one batch.
        call: Calls the model with a batch, `call(model, batch)`. If left out: a batch is a tensor;
            a tuple or list, whose first element is the input; or a dict, passed as keywords.
        max_batches: How many batches at most.
        process_group: Merge the moments of all processes of this group, each of which has its part
            of the data; `"world"` for the default group.
        sequential: Whether the layers are calibrated one after the other.
        where: Which layers; see `freeze`.
        progress: Whether to show how far it is, on a terminal and where Rich is installed.

    Returns:
        Which layers were calibrated, and which were left as they were, with the reason: one that is
        frozen (see `freeze`; unfreeze it first), that did not run, that saw no finite values or too
        few, or whose variance its type cannot hold. The statistics of a layer that is used several
        times are those of all uses.

    Raises:
        ValueError: There are no batches, `max_batches` is below 1, or `where` names no layer.
        TypeError: A batch cannot be passed to the model, the data can be gone through only once, or
            a layer is of a class of which nobody knows what its forward does.
        RuntimeError: A layer is in a transaction.

    Example:
        >>> import batchnorm as bn, torch
        >>> model, x = bn.BatchNorm(3), torch.randn(100, 3) * 4 + 7
        >>> bn.calibrate(model, x.split(16))
        1 calibrated: itself
        >>> torch.allclose(model.running_var, x.var(0))
        True

    Source:
        Ioffe & Szegedy, 2015, algorithm 2; Wu & Johnson, Rethinking "Batch" in BatchNorm, 2021
        (arXiv:2105.07576), section 3.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}: expected 1 or more")
    if sequential and iter(data) is data:
        raise TypeError(
            "sequential=True goes through the data once for each layer, but they can be gone "
            f"through only once, being a {type(data).__name__}: give a list or a loader"
        )
    report, pool = CalibrationReport(), synchronized(process_group)
    with ExitStack() as stack:
        layers = stack.enter_context(_observed(model, where, report))
        passes = len(layers) + 1 if sequential else 1
        advance = stack.enter_context(
            progress_bar("calibrating", data, max_batches, passes, progress)
        )

        def run() -> int:
            seen = 0
            for batch in limited(data, max_batches):
                call_with(model, batch, call)
                seen += 1
                advance()
            return seen

        with torch.no_grad(), uncompiled(), _order_of_calls(layers) as order:
            report.batches = run()
            if report.batches == 0 and pool is None:
                raise ValueError("there are no batches to calibrate with: data is empty")
            if sequential:
                for layer in layers.values():
                    layer.statistics, layer.update = "running", "never"
                for name in _agreed_order(order, layers, pool):
                    layers[name].ledger, layers[name].update = _Heard(), "always"
                    run()
                    layers[name].update = "never"
                    _assign(name, layers[name], pool, report)
            else:
                for name, layer in layers.items():
                    _assign(name, layer, pool, report)
    report.done.sort(key=list(layers).index)
    for name in layers:
        if name not in report.done:
            report.left.setdefault(name, "it did not run")
    return report


class _Heard(Ledger):
    """A ledger that knows whether there was anything, where nothing could be kept.

    Attributes:
        values: The number of values a channel, whether finite or not; None if the layer did not
            run.
    """

    values: Tensor | float | None = None

    def add(self, found: Plain | Tracked) -> None:
        """Add what a call found."""
        count = found.moments().count
        self.values = count if self.values is None else self.values + count
        super().add(found)


def _is_frozen(layer: _BatchNorm) -> bool:
    """Return whether the running statistics normalize and nothing is to move them."""
    if not isinstance(layer, BatchNorm):
        return False
    return layer.statistics == "running" and layer.update == "never"


@contextmanager
def _observed(
    model: nn.Module, where: Where, report: CalibrationReport
) -> Iterator[dict[str, BatchNorm]]:
    """Put the batch norms in the mode of the batch, each with a ledger, and all else in evaluation.

    Everything is restored at the end, and the statistics, too, if an error leaves the block.
    """
    chosen = batch_norms(model, where)
    for name, layer in chosen.items():
        if layer.running_mean is None:
            report.left[name] = "it has no running statistics"
        elif _is_frozen(layer):
            report.left[name] = "it is frozen"
    chosen = {name: layer for name, layer in chosen.items() if name not in report.left}
    modes = Modes(model)
    with held(chosen, "calibrate") as layers:
        buffers = [
            (buffer, buffer.clone())
            for layer in layers.values()
            for buffer in layer.buffers(recurse=False)
        ]
        try:
            for ours in layers.values():
                ours.statistics, ours.update, ours.on_small_batch = "batch", "always", "running"
                ours.process_group, ours.ledger = None, _Heard()
            model.eval()
            yield layers
        except BaseException:
            for buffer, before in buffers:
                buffer.copy_(before)
            raise
        finally:
            modes.restore()


@contextmanager
def _order_of_calls(layers: dict[str, BatchNorm]) -> Iterator[dict[str, None]]:
    """Yield the names of the layers in the order in which they are first called."""
    order: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name, layer in layers.items()
    ]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _agreed_order(
    order: dict[str, None], layers: dict[str, BatchNorm], pool: Synchronized | None
) -> list[str]:
    """Return one order for all processes, of which some may have no data: each waits for all."""
    if pool is None or not layers:
        return list(order)
    names = list(layers)
    own = [names.index(name) for name in order]
    row = torch.tensor([*own, *[-1] * (len(names) - len(own))])
    device = layers[names[0]].get_buffer("running_mean").device
    agree(pool, len(names), device, "models with unequal numbers of layers")
    rows = pool.gather(row.to(device))
    longest_first = (rows < 0).sum(1).argsort(stable=True)
    return [names[at] for at in dict.fromkeys(rows[longest_first].flatten().tolist()) if at >= 0]


def _assign(
    name: str, layer: BatchNorm, pool: Synchronized | None, report: CalibrationReport
) -> None:
    """Set a layer's running statistics to what its ledger has, if it has anything."""
    ledger, mean, var = layer.ledger, layer.running_mean, layer.running_var
    assert isinstance(ledger, _Heard)  # as long as it is observed
    assert mean is not None
    assert var is not None
    total, batches = ledger.total, ledger.batches
    if pool is not None:
        count = torch.as_tensor(batches, dtype=torch.float64, device=mean.device).reshape(1)
        total = pool.moments(total or Moments.none(layer.num_features, mean.device))
        batches, _ = pool.sums(count, count)
    if total is None or not float(total.count) > 0:
        if ledger.values is not None:
            empty = not float(ledger.values) > 0
            report.left[name] = "no batch had values" if empty else "no batch was finite"
        return
    if not float(total.count) > 1:
        report.left[name] = "it saw one value a channel, which has no variance"
        return
    found, dtype = (total.mean, total.var(correction=1)), dtype_when_let_go(layer)
    for kind, values in zip(("mean", "variance"), found, strict=True):
        if not bool(values.to(dtype).isfinite().all()):
            report.left[name] = f"its {kind} does not fit {str(dtype).removeprefix('torch.')}"
            return
    mean.copy_(found[0])
    var.copy_(found[1])
    if layer.num_batches_tracked is not None and not isinstance(layer, BatchRenorm):
        layer.num_batches_tracked.fill_(int(batches))  # in renormalization a schedule follows it
    report.done.append(name)
