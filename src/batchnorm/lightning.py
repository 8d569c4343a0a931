"""Batch norm in Lightning: one callback for calibration, transactions and freezing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from batchnorm.models.batches import CallModel
from batchnorm.models.calibrate import CalibrationReport
from batchnorm.models.schedule import Schedule
from batchnorm.models.walk import Where

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ImportError(
        "batchnorm.lightning needs Lightning: pip install 'batchnorm[lightning]'"
    ) from error


class BatchNormCallback(Callback):
    """Says when the statistics of a module move while `lightning.pytorch.Trainer.fit` trains it.

    Args:
        calibrate: At the end of `fit`, set the running statistics to the moments of the training
            data, as `calibrate` does; a number is the most batches to take of them.
        transactions: The batches of one optimizer step, more than one with
            `accumulate_grad_batches`, move the running statistics once, and not at all if the step
            was skipped: by a gradient scaler, or because `training_step` returned None.
        freeze_after: After so many steps of `trainer.global_step`, freeze the statistics and the
            affine part, as `freeze` does, until `unfreeze`.
        where: Which layers, by the names they have in the module; see `freeze`.
        call: Calls the module with a batch, `call(module, batch)`, to calibrate; see `calibrate`.

    Raises:
        ValueError: A setting cannot be, or two contradict each other.

    Example:
        >>> from batchnorm.lightning import BatchNormCallback
        >>> from lightning.pytorch import Trainer
        >>> callback = BatchNormCallback(transactions=True, calibrate=100)
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=callback)  # doctest: +SKIP
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
        self._has_call = call is not None
        self._schedule = Schedule(
            calibrate=calibrate,
            transactions=transactions,
            freeze_after=freeze_after,
            where=where,
            call=call,
        )
        self._hooks: list[Any] = []
        self._steps, self._is_taken = 0, False

    @property
    def report(self) -> CalibrationReport | None:
        """What the last calibration did, or None."""
        return self._schedule.report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, and look at the optimizers: nothing else tells of a step that was skipped.

        What could only fail after many steps is an error now.
        """
        has_forward = type(pl_module).forward is not LightningModule.forward
        if self._schedule.calibrates and not self._has_call and not has_forward:
            raise TypeError(
                f"calibrate calls the module, but {type(pl_module).__name__} has no forward: "
                "define it, or say how to call the module, call=lambda module, batch: ..."
            )
        wrapped = trainer.strategy.model
        waits = isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters
        if self._schedule.freezes and waits:
            raise ValueError(
                "what freeze_after freezes gets no gradient, for which DDP would wait: set "
                "Trainer(strategy='ddp_find_unused_parameters_true')"
            )
        self._steps, self._is_taken = trainer.global_step, False
        self._schedule.begin(pl_module, self._steps)
        if self._schedule.has_transactions:
            watched = [o for o in trainer.optimizers if isinstance(o, Optimizer)]
            self._hooks = [o.register_step_post_hook(self._look) for o in watched]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open what the batch belongs to."""
        self._schedule.open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close it, if that was the last batch of an optimizer step."""
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self._schedule.step(self._steps, taken=self._is_taken or not self._hooks)
            self._is_taken = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, in the precision of validation."""
        with trainer.precision_plugin.val_step_context():
            self._schedule.end(
                _batches(trainer, pl_module),
                most=trainer.num_training_batches,
                progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Roll back what is open."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind but what was asked for."""
        self._schedule.abandon()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        """See whether a step moved anything: a scaler makes none, or a fused one that does not."""
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
        if any(g is not None for g in gradients) and not getattr(optimizer, "found_inf", False):
            self._is_taken = True


def _batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    """Return the training batches as `training_step` gets them."""
    for batch, _, _ in CombinedLoader(trainer.train_dataloader, "max_size_cycle"):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
