"""What batch norm needs of a training loop that somebody else wrote: begin, open, step, end."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

from torch import nn

from batchnorm.models.batches import CallModel
from batchnorm.models.calibrate import CalibrationReport, calibrate
from batchnorm.models.freeze import freeze
from batchnorm.models.transaction import Transaction, transaction
from batchnorm.models.walk import Where, batch_norms

#: The schedules with an open transaction, so that one that nobody will decide can be found.
_OPEN: WeakSet[Schedule] = WeakSet()


class Schedule:
    """When the statistics of a model move in a training run, for the callbacks of frameworks.

    A framework calls `begin` once, `open` before the forward passes of an optimizer step, `step`
    after it, `end` once, and `abandon` if there is no more to come. Where it has nothing to say,
    it may call them too often: `open` again joins what is open.

    Args:
        calibrate: Whether `end` calibrates the statistics; a number is the most batches it takes.
        transactions: Whether the forward passes of an optimizer step count as one batch, and as
            none if the step was skipped.
        freeze_after: After so many optimizer steps, statistics, weight and bias are frozen.
        where: Which layers; see `freeze`.
        call: Calls the model with a batch, to calibrate; see `calibrate`.

    Attributes:
        report: What the last calibration did, or None.

    Raises:
        ValueError: A setting cannot be, or two contradict each other.

    Example:
        >>> import batchnorm as bn, torch
        >>> model, schedule = bn.BatchNorm(3), Schedule(transactions=True, freeze_after=2)
        >>> schedule.begin(model, steps=0)
        >>> for step in range(4):
        ...     schedule.open()
        ...     for micro_batch in torch.randn(32, 3).split(8):
        ...         y = model(micro_batch)
        ...     schedule.step(step + 1)
        >>> schedule.end([])
        >>> model.num_batches_tracked, model.update
        (tensor(2), 'never')
    """

    report: CalibrationReport | None = None

    def __init__(
        self,
        *,
        calibrate: bool | int = False,
        transactions: bool = False,
        freeze_after: int | None = None,
        where: Where = None,
        call: CallModel | None = None,
    ) -> None:
        if calibrate is not False and not calibrate >= 1:
            raise ValueError(
                f"calibrate is {calibrate!r}: expected True, False, or the most batches to take, "
                "1 or more"
            )
        if freeze_after is not None and not freeze_after >= 0:
            raise ValueError(
                f"freeze_after is {freeze_after!r}: expected a number of optimizer steps, or None"
            )
        if calibrate and freeze_after is not None:
            raise ValueError(
                "calibrate would find frozen, in the end, what freeze_after has frozen: give "
                "one of them, or two callbacks, with where= for the layers of each"
            )
        self.calibrates, self.has_transactions = calibrate, transactions
        self.freezes = freeze_after is not None
        self._freeze_after, self._where, self._call = freeze_after, where, call
        self._model: nn.Module | None = None
        self._is_frozen = False
        self._transaction: Transaction | None = None
        self._stack = ExitStack()

    def begin(self, model: nn.Module, steps: int) -> None:
        """Begin a training run, or go on with one.

        What a run of this model that was cut off has left open is rolled back.

        Args:
            model: The model.
            steps: How many optimizer steps were made before.

        Raises:
            ValueError: `where` names no layer.
            TypeError: A layer is of a class of which nobody knows what its forward does.
        """
        batch_norms(model, self._where)
        for schedule in [other for other in _OPEN if other._model is model]:
            schedule.abandon()
        self._model, self._is_frozen = model, False
        self._freeze_if_due(steps)

    def open(self) -> None:
        """Let the forward passes from here to `step` count as one, if that was asked for.

        Raises:
            ValueError: A layer averages over all batches, and nobody counts them.
            RuntimeError: A layer is in a transaction already.
            TypeError: A layer is of a class of which nobody knows what its forward does.
        """
        wanted = self.has_transactions and self._transaction is None and not self._is_frozen
        if wanted and self._model is not None:
            opened = transaction(self._model, where=self._where)
            self._transaction = self._stack.enter_context(opened)
            _OPEN.add(self)

    def step(self, steps: int, *, taken: bool = True) -> None:
        """Say that an optimizer step is over.

        Args:
            steps: How many there were by now, as the framework counts them.
            taken: Whether it moved the weights: what was opened is rolled back otherwise.

        Raises:
            ValueError: A layer averages over all batches, and nobody counts them.
        """
        self._decide(taken)
        self._freeze_if_due(steps)

    def end(
        self, data: Iterable[Any], *, most: float = float("inf"), progress: bool = False
    ) -> None:
        """End the run: forget what belongs to no step, and calibrate, if that was asked for.

        Args:
            data: The batches to calibrate with.
            most: How many of them at most, whatever the setting says.
            progress: Whether to show how far it is.

        Raises:
            ValueError: There are no batches.
            TypeError: A batch cannot be passed to the model.
            RuntimeError: A layer is in a transaction of somebody else.
        """
        self.abandon()
        model, self._model = self._model, None
        if model is None or not self.calibrates:
            return
        if self.calibrates is not True:
            most = min(most, self.calibrates)
        self.report = calibrate(
            model,
            data,
            call=self._call,
            max_batches=None if most == float("inf") else int(most),
            process_group="world",
            where=self._where,
            progress=progress,
        )

    def abandon(self) -> None:
        """Roll back what is open, if anything is."""
        self._decide(False)

    def _decide(self, taken: bool) -> None:
        decided, self._transaction = self._transaction, None
        _OPEN.discard(self)
        with self._stack.pop_all():  # which closes it, whatever happens
            if decided is not None and taken:
                decided.commit()
            elif decided is not None:
                decided.rollback()

    def _freeze_if_due(self, steps: int) -> None:
        due = self._freeze_after is not None and steps >= self._freeze_after
        if self._model is None or not due or self._is_frozen:
            return
        freeze(self._model, where=self._where)
        for layer in batch_norms(self._model, self._where).values():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    continue
                parameter.grad = None  # or else the optimizer would make a step of what is left
        self._is_frozen = True
