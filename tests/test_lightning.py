"""The callback in `lightning.pytorch.Trainer.fit`, beside loops written by hand."""

import builtins
import contextlib
import copy
import os
import runpy
import subprocess
import sys
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
import batchnorm.lightning
from batchnorm.lightning import BatchNormCallback

ACCUMULATE, BATCHES = 4, 10  # the last step of an epoch has two batches
STEPS = 3  # of an epoch


def digits():
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 4
    return TensorDataset(images[: 16 * BATCHES], torch.from_numpy(labels)[: 16 * BATCHES])


def loader():
    return DataLoader(digits(), batch_size=16)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3),
        bn.BatchNorm2d(6, activation="relu"), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


class Module(LightningModule):
    def __init__(self, fused=False):
        super().__init__()
        self.net = network()
        self.fused = fused

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, at):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return optimizer_of(self, fused=self.fused)


class Validated(Module):
    def validation_step(self, batch, at):
        assert not self.training
        self(batch[0])


def optimizer_of(model, **options):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01, **options)


def trainer_of(callback, **options):
    options = {"accumulate_grad_batches": ACCUMULATE, "max_epochs": 2, **options}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        accelerator="cpu",
        callbacks=callback,
        **dict.fromkeys(quiet, False),
        **options,
    )


def fit(callback, module=None, validate=False, path=None, **options):
    """Return the module after training, and its trainer."""
    module = module or (Validated if validate else Module)()
    trainer = trainer_of(callback, **options)
    trainer.fit(module, loader(), loader() if validate else None, ckpt_path=path)
    return module, trainer


def by_hand(epochs=2, skipped=(), no_loss=()):
    """Return the network after the same training, in a transaction for each step.

    Args:
        epochs: How many.
        skipped: The steps, from 0, that are not made.
        no_loss: The batches, from 0, that add no gradient.
    """
    net = network()
    optimizer = optimizer_of(net)
    micro_batches = [batch for _ in range(epochs) for batch in loader()]
    at = step = 0
    while at < len(micro_batches):
        size = min(ACCUMULATE, BATCHES - at % BATCHES)
        optimizer.zero_grad()
        with bn.transaction(net) as transaction:
            for number in range(at, at + size):
                x, y = micro_batches[number]
                loss = cross_entropy(net(x), y) / ACCUMULATE
                if number not in no_loss:
                    loss.backward()
            if step in skipped:
                transaction.rollback()
        if step not in skipped:
            optimizer.step()
        at, step = at + size, step + 1
    return net


def assert_bits(actual, expected):
    actual, expected = ({**m.state_dict()} for m in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_nothing_is_left(module, trainer=None):
    """Assert that no layer is in a transaction, nor anything of the callback on an optimizer."""
    assert type(module.net[1]) is nn.BatchNorm2d
    assert "ledger" not in module.net[1].__dict__
    assert module.net[4].ledger is None
    for optimizer in trainer.optimizers if trainer else ():
        assert not optimizer._optimizer_step_post_hooks


class TestTransactions:
    @pytest.mark.parametrize("options", [{}, {"validate": True, "val_check_interval": 3}])
    def test_statistics_move_once_an_optimizer_step(self, options):
        module, trainer = fit(BatchNormCallback(transactions=True), **options)
        assert trainer.global_step == 2 * STEPS
        assert {module.net[at].num_batches_tracked.item() for at in (1, 4)} == {2 * STEPS}
        assert_bits(module.net, by_hand())
        assert_nothing_is_left(module, trainer)

    def test_without_them_statistics_move_once_a_batch(self):
        module, _ = fit(BatchNormCallback(), max_epochs=1)
        assert module.net[1].num_batches_tracked == BATCHES

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_step_that_the_scaler_skips_leaves_them(self, fused):
        class Overflows(Module):
            def training_step(self, batch, at):
                loss = super().training_step(batch, at)
                return loss * torch.inf if at == 5 else loss

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugin.forward_context = contextlib.nullcontext
        callback = BatchNormCallback(transactions=True)
        module, trainer = fit(callback, Overflows(fused), plugins=plugin, max_epochs=1)
        assert trainer.global_step == STEPS  # the one that was skipped, too
        assert module.net[1].num_batches_tracked == STEPS - 1
        torch.testing.assert_close(
            {**module.net.state_dict()}, {**by_hand(1, skipped=[1]).state_dict()}
        )

    def test_a_step_without_a_loss_leaves_them(self):
        class Skips(Module):
            def training_step(self, batch, at):
                loss = super().training_step(batch, at)
                return None if 3 <= at < 8 else loss

        # of batch 3 there are the gradients of its step's other batches; of 4 to 7, none
        with pytest.warns(UserWarning, match="returned `None`"):
            module, _ = fit(BatchNormCallback(transactions=True), Skips(), max_epochs=1)
        assert module.net[1].num_batches_tracked == STEPS - 1
        assert_bits(module.net, by_hand(1, skipped=[1], no_loss=[3]))

    def test_a_step_that_the_module_does_not_make_leaves_them(self):
        class Skips(Module):
            def optimizer_step(self, epoch, at, optimizer, closure):
                if at == 7:
                    closure()
                else:
                    optimizer.step(closure=closure)

        module, _ = fit(BatchNormCallback(transactions=True), Skips(), max_epochs=1)
        assert_bits(module.net, by_hand(1, skipped=[1]))

    def test_what_belongs_to_no_step_is_forgotten(self):
        class Stops(Module):
            def training_step(self, batch, at):
                self.trainer.should_stop = at == 5
                return super().training_step(batch, at)

        module, trainer = fit(BatchNormCallback(transactions=True), Stops())
        assert trainer.global_step == module.net[1].num_batches_tracked == 1
        assert_nothing_is_left(module, trainer)

    def test_manual_optimization(self):
        class Manual(Module):
            automatic_optimization = False

            def training_step(self, batch, at):
                loss = super().training_step(batch, at) / ACCUMULATE
                if at % ACCUMULATE == 0:
                    self.optimizers().zero_grad()
                self.manual_backward(loss)
                if at % ACCUMULATE == ACCUMULATE - 1 or at == BATCHES - 1:
                    self.optimizers().step()

        callback = BatchNormCallback(transactions=True)
        module, _ = fit(callback, Manual(), accumulate_grad_batches=1)
        assert_bits(module.net, by_hand())

    def test_an_error_leaves_none(self):
        class Fails(Module):
            def training_step(self, batch, at):
                loss = super().training_step(batch, at)
                if at == 5:
                    raise ArithmeticError("in the second step")
                return loss

        module, callback = Fails(), BatchNormCallback(transactions=True)
        trainer = trainer_of(callback)
        with pytest.raises(ArithmeticError):
            trainer.fit(module, loader())
        assert_nothing_is_left(module, trainer)
        assert module.net[1].num_batches_tracked == 1
        bn.calibrate(module, loader())  # which refuses layers in a transaction


class TestFreezing:
    @pytest.mark.parametrize("transactions", [False, True])
    def test_nothing_moves_after_so_many_steps(self, transactions):
        options = {"transactions": transactions}
        expected, _ = fit(BatchNormCallback(**options), max_epochs=-1, max_steps=STEPS + 1)
        module, trainer = fit(
            BatchNormCallback(freeze_after=STEPS + 1, **options),
            max_epochs=4,
            validate=True,
            val_check_interval=3,
        )
        assert trainer.global_step == 4 * STEPS
        for at in (1, 4):
            assert_bits(module.net[at], expected.net[at])
        assert not torch.equal(module.net[0].weight, expected.net[0].weight)

    def test_refuses_what_ddp_would_fail_at_later(self):
        with mock.patch.dict(os.environ):
            trainer = trainer_of(BatchNormCallback(freeze_after=1), strategy="ddp", devices=1)
            try:
                with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
                    trainer.fit(Module(), loader())
            finally:
                torch.distributed.destroy_process_group()


class TestCalibration:
    @pytest.mark.parametrize(
        ("batches", "options", "expected"),
        [(True, {}, BATCHES), (3, {}, 3), (5, {"limit_train_batches": 4}, 4)],
    )
    def test_statistics_are_those_of_the_training_data(self, batches, options, expected):
        callback = BatchNormCallback(calibrate=batches)
        module, _ = fit(callback, max_epochs=1, **options)
        assert callback.report.done == ["net.1", "net.4"]
        assert callback.report.batches == module.net[1].num_batches_tracked == expected
        by_hand = copy.deepcopy(module)
        bn.calibrate(by_hand, list(loader())[:expected])
        assert_bits(module, by_hand)
        hidden = module.net[0](digits().tensors[0][: 16 * expected]).detach()
        torch.testing.assert_close(module.net[1].running_mean, hidden.mean((0, 2, 3)))
        hidden = hidden.transpose(0, 1).flatten(1)
        torch.testing.assert_close(module.net[1].running_var, hidden.var(1))

    def test_follows_transactions(self):
        module, _ = fit(BatchNormCallback(calibrate=True, transactions=True))
        expected = by_hand()
        bn.calibrate(expected, loader())
        assert_bits(module.net, expected)

    def test_batches_are_as_in_training(self):
        """They pass the hooks of the module, the precision, and the loaders, several too."""
        seen = []

        class Particular(Module):
            def on_before_batch_transfer(self, batch, index):
                return {**batch, "a": [batch["a"][0] + 1, batch["a"][1]]}

            def on_after_batch_transfer(self, batch, index):
                return batch["a"][0] * 2, batch["a"][1]

            def forward(self, x):
                seen.append(x)
                return super().forward(x)

        module = Particular()
        trainer = trainer_of(BatchNormCallback(calibrate=True), max_epochs=1, precision="64-true")
        short = DataLoader(digits(), batch_size=80)
        trainer.fit(module, {"a": loader(), "b": short})
        assert len(seen) == 2 * BATCHES
        for at, (x, _) in enumerate(loader()):
            for found in (seen[at], seen[at + BATCHES]):
                torch.testing.assert_close(found, (x.double() + 1) * 2, rtol=0, atol=0)

    def test_module_without_forward(self):
        class Headless(LightningModule):
            def __init__(self):
                super().__init__()
                self.net = network()

            training_step = None
            configure_optimizers = Module.configure_optimizers
            fused = False

        Headless.training_step = lambda self, batch, at: cross_entropy(self.net(batch[0]), batch[1])
        with pytest.raises(TypeError, match=r"Headless has no forward: .*call=lambda module"):
            fit(BatchNormCallback(calibrate=True), Headless())
        callback = BatchNormCallback(
            calibrate=True, call=lambda module, batch: module.net(batch[0])
        )
        module, _ = fit(callback, Headless(), max_epochs=1)
        assert module.net[1].num_batches_tracked == BATCHES


class TestResume:
    @pytest.mark.parametrize("freeze_after", [None, 2, STEPS, STEPS + 1])
    def test_is_as_if_it_had_not_stopped(self, freeze_after, tmp_path):
        def callback():
            return BatchNormCallback(transactions=True, freeze_after=freeze_after)

        expected, _ = fit(callback())
        _, trainer = fit(callback(), max_epochs=1)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        module, _ = fit(callback(), path=tmp_path / "one.ckpt")
        assert_bits(module, expected)
        assert module.net[1].weight.requires_grad == (freeze_after is None)

    def test_a_callback_can_train_another_module(self):
        callback = BatchNormCallback(transactions=True, freeze_after=2 * STEPS)
        fit(callback)
        module, _ = fit(callback, max_epochs=1)
        assert_bits(module.net, by_hand(1))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="freeze_after is -1"):
        BatchNormCallback(freeze_after=-1)


class TestImport:
    @pytest.mark.parametrize("missing", ["lightning", "torchmetrics"])
    def test_without_the_framework(self, missing, monkeypatch):
        real = builtins.__import__

        def fail(name, *args, **kwargs):
            if name.startswith("lightning"):
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fail)
        with pytest.raises(ImportError) as raised:
            runpy.run_path(batchnorm.lightning.__file__)
        way_out = "batchnorm.lightning needs Lightning: pip install 'batchnorm[lightning]'"
        assert str(raised.value) == (
            way_out if missing == "lightning" else "No module named 'torchmetrics'"
        )

    def test_the_package_imports_no_framework(self):
        code = "import batchnorm, sys; print({'lightning', 'transformers'} & {*sys.modules})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "set()\n"
