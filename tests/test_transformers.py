"""The callback in `transformers.Trainer`, beside loops written by hand."""

import builtins
import runpy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import batchnorm as bn
import batchnorm.transformers
from batchnorm.transformers import BatchNormCallback

ACCUMULATE, BATCHES, SIZE = 4, 10, 16  # the last step of an epoch has two batches
STEPS = 3  # of an epoch


def digits():
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images[: SIZE * BATCHES]).float().reshape(-1, 1, 8, 8) / 4
    labels = torch.from_numpy(labels[: SIZE * BATCHES])
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def batches():
    examples = digits()
    return [
        {name: torch.stack([e[name] for e in examples[at : at + SIZE]]) for name in examples[0]}
        for at in range(0, len(examples), SIZE)
    ]


def network():
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1],
            layer_type="basic", num_labels=10,
        )
    )  # fmt: skip


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def trainer_of(path, callbacks, model=None, scaler=None, **options):
    options = {
        "gradient_accumulation_steps": ACCUMULATE,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "train_sampling_strategy": "sequential",
        **options,
    }
    model = model or network()
    trainer = Trainer(
        model,
        TrainingArguments(
            path, use_cpu=True, per_device_train_batch_size=SIZE, report_to="none",
            disable_tqdm=True, logging_strategy="no", **options,
        ),
        train_dataset=digits(),
        callbacks=callbacks,
        optimizers=(optimizer_of(model), None),
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs = False  # it takes any, and would leave the sum a sum
    trainer.accelerator.scaler = scaler
    return trainer


@pytest.fixture
def fit(tmp_path):
    """Return a function that returns the model after training, and its trainer."""

    def fit(callback, resume=None, **options):
        trainer = trainer_of(tmp_path, [callback], **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, trainer

    return fit


def by_hand(epochs=2, skipped=()):
    """Return the model after the same training, in a transaction for each step.

    Args:
        epochs: How many.
        skipped: The steps, from 0, that are not made.
    """
    model, step = network(), 0
    optimizer = optimizer_of(model)
    for _ in range(epochs):
        for at in range(0, BATCHES, ACCUMULATE):
            micro_batches = batches()[at : at + ACCUMULATE]
            optimizer.zero_grad()
            with bn.transaction(model) as transaction:
                for batch in micro_batches:
                    (model(**batch).loss / len(micro_batches)).backward()
                if step in skipped:
                    transaction.rollback()
            if step not in skipped:
                optimizer.step()
            step += 1
    return model


def assert_bits(actual, expected):
    actual, expected = ({**m.state_dict()} for m in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_in_no_transaction(model):
    assert {type(layer) for layer in layers(model).values()} == {nn.BatchNorm2d}
    assert not [name for name, layer in layers(model).items() if "ledger" in layer.__dict__]


class Fails(TrainerCallback):
    """Raises an error in the second step."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise ArithmeticError


class TestTransactions:
    def test_statistics_move_once_an_optimizer_step(self, fit):
        model, trainer = fit(BatchNormCallback(transactions=True))
        assert trainer.state.global_step == 2 * STEPS
        assert {m.num_batches_tracked.item() for m in layers(model).values()} == {2 * STEPS}
        assert_bits(model, by_hand())
        assert_in_no_transaction(model)

    def test_without_them_statistics_move_once_a_batch(self, fit):
        model, _ = fit(BatchNormCallback(), num_train_epochs=1)
        assert {m.num_batches_tracked.item() for m in layers(model).values()} == {BATCHES}

    def test_a_step_that_the_scaler_skips_leaves_them(self, fit):
        # the first step overflows, and from then on the scale is 1
        scaler = torch.amp.GradScaler("cpu", 2.0**127, backoff_factor=2.0**-127)
        callback = BatchNormCallback(transactions=True)
        model, trainer = fit(callback, scaler=scaler, num_train_epochs=1)
        assert trainer.state.global_step == STEPS  # the one that was skipped, too
        assert {m.num_batches_tracked.item() for m in layers(model).values()} == {STEPS - 1}
        assert_bits(model, by_hand(1, skipped=[0]))

    def test_an_error_in_a_with_block_leaves_none(self, tmp_path):
        callback = BatchNormCallback(transactions=True)
        trainer = trainer_of(tmp_path, [callback, Fails()])
        with pytest.raises(ArithmeticError), callback:
            trainer.train()
        assert_in_no_transaction(trainer.model)
        assert {m.num_batches_tracked.item() for m in layers(trainer.model).values()} == {1}

    def test_an_error_leaves_none_to_the_next_training(self, tmp_path, fit):
        model = network()
        cut_off = trainer_of(tmp_path, [BatchNormCallback(transactions=True), Fails()], model)
        with pytest.raises(ArithmeticError):
            cut_off.train()
        model.load_state_dict(network().state_dict())
        fit(BatchNormCallback(transactions=True), model=model)
        assert_in_no_transaction(model)
        assert_bits(model, by_hand())


class TestFreezing:
    def test_nothing_moves_after_so_many_steps(self, fit):
        options = {"transactions": True}
        expected, _ = fit(BatchNormCallback(**options), max_steps=STEPS + 1)
        callback = BatchNormCallback(freeze_after=STEPS + 1, **options)
        model, trainer = fit(callback, num_train_epochs=4)
        assert trainer.state.global_step == 4 * STEPS
        for name, layer in layers(expected).items():
            assert_bits(model.get_submodule(name), layer)
        assert not torch.equal(model.classifier[1].weight, expected.classifier[1].weight)


class TestCalibration:
    @pytest.mark.parametrize(("batches_taken", "expected"), [(True, BATCHES), (3, 3)])
    def test_statistics_are_those_of_the_training_data(self, batches_taken, expected, fit):
        callback = BatchNormCallback(calibrate=batches_taken, transactions=True)
        model, _ = fit(callback)
        assert callback.report.done == list(layers(model))
        assert callback.report.batches == expected
        calibrated = by_hand()
        bn.calibrate(calibrated, batches()[:expected])
        assert_bits(model, calibrated)
        embedder = model.resnet.embedder.embedder
        x = torch.cat([batch["pixel_values"] for batch in batches()[:expected]])
        hidden = embedder.convolution(x).detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(embedder.normalization.running_mean, hidden.mean(1))
        torch.testing.assert_close(embedder.normalization.running_var, hidden.var(1))

    def test_calls_the_model_as_it_is_told(self, fit):
        seen = []
        callback = BatchNormCallback(
            calibrate=2, call=lambda model, batch: seen.append(model(batch["pixel_values"]))
        )
        fit(callback, num_train_epochs=1)
        assert [output.loss for output in seen] == [None, None]


class TestResume:
    @pytest.mark.parametrize("freeze_after", [None, 2, STEPS, STEPS + 1])
    def test_is_as_if_it_had_not_stopped(self, freeze_after, fit, tmp_path):
        def callback():
            return BatchNormCallback(transactions=True, freeze_after=freeze_after)

        expected, _ = fit(callback(), save_strategy="steps", save_steps=STEPS)
        model, _ = fit(callback(), resume=str(tmp_path / f"checkpoint-{STEPS}"))
        assert_bits(model, expected)
        trained = {p.requires_grad for m in layers(model).values() for p in m.parameters()}
        assert trained == {freeze_after is None}


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="freeze_after is -1"):
        BatchNormCallback(freeze_after=-1)


@pytest.mark.parametrize("missing", ["transformers", "tokenizers"])
def test_without_the_framework(missing, monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "transformers":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError) as raised:
        runpy.run_path(batchnorm.transformers.__file__)
    way_out = "batchnorm.transformers needs Transformers: pip install 'batchnorm[transformers]'"
    assert str(raised.value) == (
        way_out if missing == "transformers" else "No module named 'tokenizers'"
    )
