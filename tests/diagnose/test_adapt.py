"""Adaptation: what is blended, what it says, and that all of it can be taken back."""

import json
import math

import pytest
import torch
from diagnose.drawn import draw, same, state_of, trained
from torch import nn

import batchnorm as bn
from batchnorm.diagnose.accuracy import gain


def batches(count, *args, size=50, **kwargs):
    return list(draw(count, *args, **kwargs).split(size))


def test_with_no_prior_strength_it_is_calibration():
    adapted, calibrated, data = trained(), trained(), batches(200, 1.0, seed=0)
    report = bn.adapt(adapted, data, prior=0)
    bn.calibrate(calibrated, data)
    for ours, theirs in ((adapted[1], calibrated[1]), (adapted[4], calibrated[4])):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert int(ours.num_batches_tracked) == 100  # it was trained for as many
    assert report.weights == {"1": 1.0, "4": 1.0}


def test_a_prior_is_examples_of_the_source():
    model, target, data = trained(), trained(), batches(200, 1.0, seed=0)
    before = model[1].running_mean.clone(), model[1].running_var.clone()
    bn.calibrate(target, data)
    report = bn.adapt(model, data, prior=600)
    assert report.weights == {"1": 0.25, "4": 0.25}
    for found, source, other in zip(
        (model[1].running_mean, model[1].running_var),
        before,
        (target[1].running_mean, target[1].running_var),
        strict=True,
    ):
        torch.testing.assert_close(found, 0.75 * source + 0.25 * other)


def test_by_itself_it_trusts_many_examples_and_far_ones():
    def weight(count, shift):
        model = trained(batches=400)
        return bn.adapt(model, batches(count, shift, seed=3)).weights["1"]

    assert weight(400, 0.3) > weight(16, 0.3)
    assert weight(32, 2.0) > weight(32, 0.3)
    assert weight(32, 2.0) > 0.9
    assert weight(32, 0.0) < 0.6


def test_the_weight_has_the_least_error_or_nearly():
    """Over samples, the chosen weight is about as near to the truth as the best fixed one."""
    torch.manual_seed(0)
    truth = 0.25
    errors = {None: 0.0, 0: 0.0, 1e9: 0.0}
    for seed in range(60):
        x = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed)) + truth
        for prior in errors:
            layer = nn.BatchNorm1d(40).eval()
            bn.adapt(layer, [x], prior=prior)
            errors[prior] += float((layer.running_mean - truth).square().mean())
    assert errors[None] < errors[0]
    assert errors[None] < errors[1e9]


def test_it_says_what_it_did_and_takes_it_back_bit_for_bit():
    model = trained()
    before = state_of(model)
    report = bn.adapt(model, batches(200, 1.5, seed=0), entropy_steps=5)
    assert report.before.shifted
    assert not report.after.shifted
    assert not same(model, before)
    lines = repr(report).splitlines()
    assert lines[0] == "2 adapted: 1, 4"
    assert all(len(line) <= 80 for line in lines)
    assert json.loads(json.dumps(report.to_dict()))["examples"] == 200
    report.undo()
    assert same(model, before)
    assert not model.training


def test_taken_back_in_another_type():
    model = trained()
    before = model[1].running_mean.clone()
    report = bn.adapt(model, batches(100, 1.0, seed=0))
    model.double()
    report.undo()
    torch.testing.assert_close(model[1].running_mean, before.double(), rtol=0, atol=0)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 3, 6, 9, 11])
def test_an_error_changes_nothing(error, at):
    model = trained().train()
    before, calls = state_of(model), []

    def call(module, batch):
        calls.append(batch)
        if len(calls) == at:
            raise error
        return module(batch)

    with pytest.raises(error):
        bn.adapt(model, batches(200, 1.0, seed=0), entropy_steps=4, call=call)
    assert same(model, before)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_statistics_that_were_not_finite_are_those_of_the_target():
    model = trained()
    model[4].running_mean[0] = math.nan
    report = bn.adapt(model, batches(200, seed=0))
    assert report.weights["4"] == 1
    assert model[4].running_mean.isfinite().all()


class TestAccuracy:
    """With labels, what it did to the accuracy."""

    @staticmethod
    def labelled(model, shift):
        x = draw(400, seed=1)
        labels = model(x).argmax(1).detach()  # what it says of the inputs as they are
        return [
            (a + shift, b) for a, b in zip(x.split(100), labels.split(100), strict=True)
        ]  # fmt: skip

    def test_better(self):
        model = trained()
        report = bn.adapt(model, self.labelled(model, 3.0))
        assert report.gain.is_better
        assert report.gain.after > 0.9 > report.gain.before
        assert "better (+" in repr(report)

    def test_worse_is_said(self):
        model = trained()
        data = [batch for batch in self.labelled(model, 0.0) for _ in range(2)]
        x = torch.cat([batch for batch, _ in data])
        labels = torch.cat([label for _, label in data])
        chosen = labels == labels.mode().values  # one class alone: other moments, same inputs
        report = bn.adapt(model, [(x[chosen], labels[chosen])], prior=0)
        assert report.gain.before == 1
        assert report.gain.is_worse
        assert "WORSE" in repr(report)
        assert "report.undo() takes it back" in repr(report)

    def test_labels_under_another_name_or_none(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = trained()

            def forward(self, x, labels=None):
                return self.model(x)

        model = Model().eval()
        data = [{"x": x, "labels": y} for x, y in self.labelled(model.model, 1.0)]
        assert bn.adapt(model, data).gain.examples == 400
        assert bn.adapt(trained(), batches(100, 1.0, seed=0)).gain is None
        mixed = [*self.labelled(trained(), 0.0), draw(10, seed=0)]
        assert bn.adapt(trained(), mixed).gain is None

    def test_the_interval_holds_the_truth(self):
        generator = torch.Generator().manual_seed(0)
        inside = 0
        for _ in range(500):
            before = torch.rand(120, generator=generator) < 0.8
            flips = torch.rand(120, generator=generator) < 0.15  # -0.09 on average
            found = gain(before, before ^ flips)
            inside += found.low <= -0.09 <= found.high
        assert inside >= 460

    def test_shuffled_data_are_compared_as_two_samples(self):
        model = trained()
        data = self.labelled(model, 0.0)

        class Shuffled(list):
            def __iter__(self):
                order = torch.randperm(400)
                x, y = (torch.cat(part)[order] for part in zip(*data, strict=True))
                return iter(list(zip(x.split(100), y.split(100), strict=True)))

        in_order = bn.adapt(trained(), data, prior=1e9).gain
        shuffled = bn.adapt(trained(), Shuffled(data), prior=1e9).gain
        assert shuffled.high - shuffled.low > in_order.high - in_order.low
        assert shuffled.low < 0 < shuffled.high

    def test_nothing_changed(self):
        found = gain(torch.ones(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool))
        assert found.low < 0 < found.high
        assert "no clear difference" in str(found)


class TestEntropy:
    """Gamma and beta trained without labels."""

    def test_predictions_get_sharper_and_only_affine_parts_move(self):
        model = trained()
        before = state_of(model)
        report = bn.adapt(model, batches(200, 0.5, seed=0), entropy_steps=20, learning_rate=0.05)
        first, last = report.sharpened.entropy
        assert last < first
        assert report.sharpened.steps == 20
        moved = {name for name, value in model.state_dict().items()
                 if not torch.equal(value, before[name])}  # fmt: skip
        assert {name for name in moved if "running" not in name} == {
            "1.weight", "1.bias", "4.weight", "4.bias"
        }  # fmt: skip
        assert all(p.requires_grad and p.grad is None for p in model.parameters())

    def test_a_collapse_is_taken_back(self):
        model = trained()
        data = batches(200, 0.5, seed=0)
        plain = trained()
        bn.adapt(plain, data)
        report = bn.adapt(model, data, entropy_steps=200, learning_rate=2.0)
        assert report.sharpened.collapse is not None
        assert "taken back" in repr(report)
        assert same(model, state_of(plain))

    def test_a_single_step_may_collapse_too(self):
        report = bn.adapt(trained(), batches(200, 0.5, seed=0), entropy_steps=1, learning_rate=1e4)
        assert report.sharpened.collapse is not None
        assert report.sharpened.steps == 0

    def test_frozen_parameters_stay_frozen(self):
        model = trained()
        model[0].weight.requires_grad_(False)
        model[1].weight.requires_grad_(False)
        bn.adapt(model, batches(100, 0.5, seed=0), entropy_steps=2)
        wanted = [p.requires_grad for p in model.parameters()]
        assert wanted == [False, True, False, *[True] * 7]

    def test_a_model_without_logits(self):
        model = nn.Sequential(nn.BatchNorm2d(3))
        with pytest.raises(ValueError, match="returns no logits"):
            bn.adapt(model, [draw(20, seed=0)], entropy_steps=1)
        model = nn.Sequential(nn.BatchNorm1d(3, affine=False))
        with pytest.raises(ValueError, match="no batch norm has gamma or beta"):
            bn.adapt(model, [torch.randn(20, 3)], entropy_steps=1)


class TestAdapting:
    """One batch at a time, and forgotten."""

    @pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
    def test_the_blend(self, norm):
        layer = norm(3).eval()
        layer.running_mean += 2
        x = draw(48, seed=0)
        with bn.adapting(layer, prior=16):
            y = layer(x)
        mean = 0.25 * layer.running_mean + 0.75 * x.mean((0, 2, 3))
        var = 0.25 * layer.running_var + 0.75 * x.var((0, 2, 3), correction=0)
        expected = nn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(layer.running_mean, torch.full((3,), 2.0))

    def test_nothing_is_kept_also_after_an_error(self):
        model = trained()
        before, x = state_of(model), draw(20, 1.0, seed=0)
        buffers = [model[1].running_mean, model[4].running_var]
        plain = model(x)
        with bn.adapting(model):
            assert not torch.equal(model(x), plain)
            assert same_tensors(buffers, [model[1].running_mean, model[4].running_var])
        with pytest.raises(RuntimeError), bn.adapting(model):
            model(x[:, :2])
        with pytest.raises(ValueError, match="expected 4D"), bn.adapting(model[1]):
            model[1](x[0, 0])
        assert same(model, before)
        assert same_tensors(buffers, [model[1].running_mean, model[4].running_var])
        assert torch.equal(model(x), plain)

    def test_one_inside_another_and_what_was_compiled(self):
        model, x = trained(), draw(20, 1.0, seed=0)
        before = state_of(model)
        with bn.adapting(model):
            expected = model(x)
            with bn.adapting(model):
                torch.testing.assert_close(model(x), expected)
        assert same(model, before)
        compiled = torch.compile(model, backend="eager")
        plain = compiled(x)
        with bn.adapting(compiled):
            torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x), plain)

    def test_training_and_single_values_are_left_alone(self):
        layer = nn.BatchNorm1d(3)
        x = torch.randn(1, 3)
        with bn.adapting(layer.eval()):
            torch.testing.assert_close(layer(x), x / math.sqrt(1 + 1e-5))
            y = layer.train()(x.expand(8, 3) * torch.arange(8.0)[:, None])
        torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
        assert int(layer.num_batches_tracked) == 1

    def test_a_batch_that_is_not_finite(self):
        layer = nn.BatchNorm1d(3).eval()
        x = torch.randn(8, 3)
        x[0, 0] = math.nan
        with bn.adapting(layer):
            torch.testing.assert_close(layer(x), layer(x), equal_nan=True)
            assert layer(x)[1:].isfinite().all()

    def test_gradients_flow(self):
        model, x = trained(), draw(20, seed=0).requires_grad_()
        with bn.adapting(model):
            model(x).square().sum().backward()
        assert x.grad.isfinite().all()
        assert model[1].weight.grad is not None


def same_tensors(first, second):
    return all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"prior": -1}, "prior is -1: expected 0 or more"),
        ({"entropy_steps": -1}, "entropy_steps is -1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
    ],
)
def test_bad_settings(settings, why):
    with pytest.raises(ValueError, match=why):
        bn.adapt(trained(), [draw(20)], **settings)


def test_bad_input():
    with pytest.raises(TypeError, match="gone through only once, being a generator"):
        bn.adapt(trained(), (draw(20) for _ in range(2)))
    with pytest.raises(ValueError, match="no running statistics to compare with"):
        bn.adapt(nn.Linear(3, 3), [torch.randn(8, 3)])
    with pytest.raises(ValueError, match="prior is -2"), bn.adapting(trained(), prior=-2):
        pass
