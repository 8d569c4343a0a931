"""How the distributions inside a network move while it trains."""

from __future__ import annotations

import math
from contextlib import ExitStack
from textwrap import fill
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from batchnorm.diagnose.monitor_measures import PERCENTILES, Measured, Record, chosen, measure
from batchnorm.diagnose.monitor_records import (
    GRADIENTS,
    Row,
    by_layer,
    draw,
    frame,
    moved_most,
    plain,
    record_of,
    row_of,
    write,
)
from batchnorm.diagnose.monitor_steps import Steps
from batchnorm.diagnose.observe import Seen, observed
from batchnorm.models.batches import uncompiled
from batchnorm.models.walk import Where, batch_norms
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Monitor:
    """Records what the batch norms of a network get, every so many steps of its training.

    Of each layer: percentiles of the input, the moments of the batch, how far these are from those
    of the record before and from the running statistics, weight and bias, the norms of their
    gradients, and the share of dead channels; see `Record`. The training loop stays as it is, and
    so does what comes of it, bit for bit; but where a compiled model draws random numbers, as
    recorded passes run as it was written.

    A step is from a forward pass of the model, in training and with gradients on, to the next step
    of an optimizer of `torch.optim` that has any of its parameters, or else to `step()`. Its first
    pass is recorded, and in that the first call of each layer. Evaluation, and the recomputation of
    a checkpoint, are not.

    Memory is bounded: at `max_records` records every second one goes, and `every` doubles.

    Args:
        model: The model as the loop calls it: what `torch.compile` or DDP returned.
        every: How many steps from record to record. It doubles whenever the records are full.
        where: Which layers: a pattern of names, as `"layer4.*"`, several, or a function of the
            name and the layer; all if left out.
        max_records: How many records a layer has at most.
        writer: TensorBoard's `SummaryWriter`, or what else has `add_scalar(name, value, step)`,
            to write each record to when its step is over.

    Raises:
        ValueError: The model has no batch norm in it, `where` names none, or a number cannot be.
        TypeError: The writer has no `add_scalar`.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with bn.Monitor(model, every=2) as monitor:
        ...     for _ in range(10):
        ...         loss = model(torch.randn(16, 3)).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> [record.step for record in monitor.records]
        [0, 2, 4, 6, 8]
        >>> monitor.records[1].moved > 0
        True

    Source:
        Ioffe & Szegedy, Batch normalization, 2015 (arXiv:1502.03167), figure 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 20,
        where: Where = None,
        max_records: int = 512,
        writer: Any = None,
    ) -> None:
        for name, value, least in (("every", every, 1), ("max_records", max_records, 2)):
            if value < least:
                raise ValueError(f"{name} is {value}: expected {least} or more")
        if writer is not None and not hasattr(writer, "add_scalar"):
            raise TypeError(
                f"writer is a {type(writer).__name__}, which has no add_scalar: expected a "
                "torch.utils.tensorboard.SummaryWriter"
            )
        self.every = every
        self._model, self._where, self._most, self._writer = model, where, max_records, writer
        self._layers = batch_norms(model, where)
        if not self._layers or model in self._layers.values():
            what = "is a batch norm itself" if self._layers else "has no batch norm"
            raise ValueError(
                f"this {type(model).__name__} {what}: expected a network with batch norms in it, "
                "as nn.Sequential(layer)"
            )
        self._steps = Steps(model, self._begin, self._keep, self._end)
        self._rows: dict[int, dict[str, Row]] = {}  # by step and layer
        self._last: dict[str, tuple[int, Moments]] = {}  # the latest record's step and moments
        self._open: int | None = None  # the step whose record may still get its gradients
        self._found: dict[str, Measured] = {}  # in the pass that runs

    def start(self) -> None:
        """Attach to the model; what was recorded before stays.

        Raises:
            RuntimeError: It has started.
            ValueError: `where` names no layer of the model any more, or its `compile()` was called.

        Example:
            >>> import batchnorm as bn
            >>> from torch import nn
            >>> monitor = bn.Monitor(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)))
            >>> monitor.start()
            >>> monitor.stop()
        """
        if self._steps.is_attached:
            raise RuntimeError("the monitor has started: stop it first, monitor.stop()")
        if getattr(self._model, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"this {type(self._model).__name__} was compiled in place, so that no hook of it "
                "is called: leave .compile() out, and give the monitor torch.compile(model)"
            )
        self._layers = batch_norms(self._model, self._where)
        self._steps.attach()

    def stop(self) -> None:
        """Detach from the model, and write the last record; the records stay.

        Example:
            >>> import batchnorm as bn
            >>> from torch import nn
            >>> monitor = bn.Monitor(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)))
            >>> monitor.stop()  # it has not started, and there is nothing to do
        """
        self._steps.detach()
        self._finish()

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def step(self) -> None:
        """Say that a step is over, where no optimizer of `torch.optim` says so.

        Example:
            >>> import batchnorm as bn, torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
            >>> with bn.Monitor(model, every=1) as monitor:
            ...     for _ in range(3):
            ...         y = model(torch.randn(16, 3))
            ...         monitor.step()
            >>> len(monitor.records)
            3
        """
        self._steps.step()

    @property
    def records(self) -> list[Record]:
        """Return what was recorded, by step, and of each step by layer, in the model's order.

        Example:
            >>> import batchnorm as bn
            >>> from torch import nn
            >>> bn.Monitor(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))).records
            []
        """
        return [
            record_of(step, name, row)
            for step, of in self._rows.items()
            for name, row in of.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, which JSON can hold; None for what is not finite.

        `channels` are those that the percentiles are of.

        Example:
            >>> import batchnorm as bn
            >>> from torch import nn
            >>> bn.Monitor(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))).to_dict()
            {'steps': 0, 'every': 20, 'levels': [15, 50, 85], 'layers': {}}
        """
        layers = {
            name: {"channels": chosen(len(self._last[name][1].mean)), **data}
            for name, data in plain(self.records).items()
        }
        return {
            "steps": self._steps.done,
            "every": self.every,
            "levels": list(PERCENTILES),
            "layers": layers,
        }

    def to_frame(self) -> Any:
        """Return a `pandas.DataFrame`, a row for each record of a layer.

        `p15_0` is the 15th percentile of the first of the channels that there are percentiles of.

        Raises:
            ImportError: pandas is not installed.

        Example:
            >>> import batchnorm as bn
            >>> from torch import nn
            >>> monitor = bn.Monitor(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)))
            >>> monitor.to_frame().groupby("layer").moved.mean()  # doctest: +SKIP
        """
        return frame(self.records)

    def plot(self, layer: Where = None) -> Figure:
        """Return a figure: percentiles by step of each layer, and beside them the distances.

        Args:
            layer: Which layers, as `where`; 6 at most, evenly over the depth.

        Raises:
            ValueError: `layer` names no batch norm of the model.
            RuntimeError: Nothing was recorded of them.

        Example:
            >>> import batchnorm as bn, torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
            >>> with bn.Monitor(model) as monitor:
            ...     y = model(torch.randn(16, 3))
            >>> monitor.plot()  # doctest: +ELLIPSIS
            <Figure size ...>
        """
        kept = by_layer(self.records)
        found = {name: kept[name] for name in batch_norms(self._model, layer) if name in kept}
        if not found:
            raise RuntimeError(f"there is nothing to plot: {self!r}")
        return draw(found)

    def __repr__(self) -> str:
        steps, layers = self._rows, len({name for of in self._rows.values() for name in of})
        if not steps:
            return (
                "Monitor: no records, for no training forward pass was seen;\n"
                "    give it the model that the loop calls"
            )
        lines = [
            f"Monitor: {len(steps)} record{'s' * (len(steps) > 1)} of {layers} "
            f"layer{'s' * (layers > 1)} in {self._steps.done} steps, every={self.every}"
        ]
        if self._steps.done == 0 and self._steps.passes > 1:
            lines.append(
                f"  no optimizer has stepped after {self._steps.passes} forward passes: call "
                "monitor.step() after each update"
            )
        most = [f"{name} {far:.2g}" for name, far in moved_most(self.records)[:3]]
        if most:
            lines.append(f"  moved most: {', '.join(most)}")
        return "\n".join(fill(line, 80, subsequent_indent="    ") for line in lines)

    def _begin(self, entered: ExitStack) -> None:
        """Attach to the layers, if the step that begins is to be recorded."""
        self._finish()
        step = self._steps.done
        if step % self.every == 0 and len(self._rows) >= self._most:
            self.every *= 2
            self._rows = {kept: of for kept, of in self._rows.items() if kept % self.every == 0}
        if step % self.every == 0:
            self._found = {}
            entered.enter_context(uncompiled())
            entered.enter_context(observed(self._layers, self._see))

    def _see(self, name: str, seen: Seen) -> None:
        """Measure the first call of a layer."""
        if name not in self._found:
            _, previous = self._last.get(name, (0, None))
            measured = measure(self._layers[name], seen, previous)
            if measured is not None:
                self._found[name] = measured

    def _keep(self) -> None:
        """Keep what was measured in a pass."""
        if not self._found:
            return
        step, found, rows = self._steps.done, self._found, dict[str, Row]()
        self._found = {}
        for name in (name for name in self._layers if name in found):
            before, _ = self._last.get(name, (math.nan, None))
            rows[name] = row_of(step - before, found[name])
            self._last[name] = step, found[name].moments
        self._rows[step], self._open = rows, step

    def _end(self, own: set[int] | None) -> None:
        """Read the gradients as the optimizer used them, where they still are."""
        if self._open is None:
            return
        for name, row in self._rows[self._open].items():
            for key, at in GRADIENTS.items():
                parameter = self._layers[name]._parameters.get(key)
                if parameter is None or parameter.grad is None:
                    continue
                if own is None or id(parameter) in own:
                    row[at] = float(torch.linalg.vector_norm(parameter.grad.float()))

    def _finish(self) -> None:
        """Write the record of a step that is over."""
        if self._open is not None:
            step, self._open = self._open, None
            if self._writer is not None:
                write(
                    self._writer, (record_of(step, n, row) for n, row in self._rows[step].items())
                )
