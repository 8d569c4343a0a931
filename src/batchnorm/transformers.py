"""Batch norm in Transformers: one callback for calibration, transactions and freezing."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from batchnorm.models.batches import CallModel
from batchnorm.models.calibrate import CalibrationReport
from batchnorm.models.schedule import Schedule
from batchnorm.models.walk import Where

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "batchnorm.transformers needs Transformers: pip install 'batchnorm[transformers]'"
    ) from error


class BatchNormCallback(TrainerCallback):
    """Says when the statistics of a model move while `transformers.Trainer` trains it.

    The trainer tells a callback nothing of an error that leaves `train`. Then the transaction of
    the step that was cut off stays open until the model is trained again, or until the end of a
    `with` block over the callback.

    Args:
        calibrate: At the end of `train`, set the running statistics to the moments of the training
            data, as `calibrate` does; a number is the most batches to take of them.
        transactions: The batches of one optimizer step, more than one with
            `gradient_accumulation_steps`, move the running statistics once, and not at all if the
            gradient scaler skipped the step.
        freeze_after: After so many steps of `state.global_step`, freeze the statistics and the
            affine part, as `freeze` does, until `unfreeze`.
        where: Which layers, by the names they have in the model; see `freeze`.
        call: Calls the model with a batch, `call(model, batch)`, to calibrate; see `calibrate`.

    Raises:
        ValueError: A setting cannot be, or two contradict each other.

    Example:
        >>> from batchnorm.transformers import BatchNormCallback
        >>> from transformers import Trainer
        >>> with BatchNormCallback(transactions=True, calibrate=100) as callback:
        ...     Trainer(model, arguments, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        calibrate: bool | int = False,
        transactions: bool = False,
        freeze_after: int | None = None,
        where: Where = None,
        call: CallModel | None = None,
    ) -> None:
        self._schedule = Schedule(
            calibrate=calibrate,
            transactions=transactions,
            freeze_after=freeze_after,
            where=where,
            call=call,
        )

    @property
    def report(self) -> CalibrationReport | None:
        """What the last calibration did, or None."""
        return self._schedule.report

    def __enter__(self) -> BatchNormCallback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._schedule.abandon()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin."""
        self._schedule.begin(kwargs["model"], state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open what the batches of the step belong to."""
        self._schedule.open()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close it."""
        skipped = getattr(kwargs["optimizer"], "step_was_skipped", False)
        self._schedule.step(state.global_step, taken=not skipped)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calibrate."""
        progress = state.is_world_process_zero and not args.disable_tqdm
        self._schedule.end(kwargs["train_dataloader"], progress=progress)
