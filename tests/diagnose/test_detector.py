"""The detector: how rarely it is wrong, how soon it is right, and that it leaves no trace."""

import math

import numpy as np
import pytest
import torch
from diagnose.drawn import draw, same, state_of, trained
from torch import nn

import batchnorm as bn
from batchnorm.diagnose.detector import threshold


def test_the_threshold_gives_the_run_length():
    """Standard normal numbers, summed up as windows are, to the first alarm."""
    draw = np.random.default_rng(0)
    lengths = []
    h = threshold(50)
    for _ in range(400):
        total, steps = 0.0, 0
        while total <= h:
            total = max(0.0, total + draw.standard_normal() - 0.5)
            steps += 1
        lengths.append(steps)
    assert np.mean(lengths) == pytest.approx(50, rel=0.15)
    assert threshold(1000) > threshold(100) > threshold(10) > 0


def test_clean_streams_have_few_alarms_and_shifted_ones_an_early_one():
    model = trained(batches=300)
    early, alarms = [], 0
    for stream in range(20):
        with torch.no_grad(), bn.ShiftDetector(model, run_length=200) as detector:
            for at in range(20):
                model(draw(32, seed=1000 * stream + at))
            alarms += detector.alarm
            detector.reset()
            for at in range(10):
                model(draw(32, 0.5, seed=1000 * stream + at))
                if detector.alarm:
                    break
            early.append(at + 1)
    assert alarms <= 4
    assert np.median(early) <= 4


@pytest.mark.parametrize("size", [1, 5, 32, 100])
def test_any_size_of_batch(size):
    model, x = trained(), draw(320, 1.0, seed=0)
    with torch.no_grad(), bn.ShiftDetector(model) as detector:
        for batch in x.split(size):
            model(batch)
    assert detector.alarm
    assert all(look.z > 2 for look in detector.looks)
    assert len(detector.looks) == {1: 10, 5: 9, 32: 10, 100: 3}[size]
    assert detector.looks[-1].examples == {1: 320, 5: 315, 32: 320, 100: 300}[size]
    report = detector.report()
    assert report.shifted
    assert list(report.layers) == ["1", "4"]


def test_outputs_and_model_are_as_without_it():
    model, x = trained(), draw(64, seed=0)
    before, state = state_of(model), torch.get_rng_state()
    plain = model(x)
    with bn.ShiftDetector(model) as detector:
        assert torch.equal(model(x), plain)
    assert len(detector.looks) == 1
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    model(x)
    assert len(detector.looks) == 1
    with pytest.raises(ZeroDivisionError), bn.ShiftDetector(model):
        raise ZeroDivisionError
    assert same(model, before)


def test_training_is_not_heard():
    model = trained().train()
    with bn.ShiftDetector(model) as detector:
        model(draw(64, 3.0, seed=0))
    assert not detector.looks


def test_a_network_that_failed_in_between():
    model, x = trained(), draw(64, seed=0)
    with bn.ShiftDetector(model) as detector:
        with pytest.raises(RuntimeError):
            model(x[:, :2])
        model(x)
    assert len(detector.looks) == 1


def test_layers_channels_and_positions_are_chosen_evenly():
    model = nn.Sequential(*[bn.BatchNorm1d(40) for _ in range(20)]).eval()
    detector = bn.ShiftDetector(model, layers=3, channels=10)
    assert list(detector.layers) == ["0", "10", "19"]
    with detector:
        model(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)) + 5)
    channels = {c.channel for c in detector.report().channels if c.layer == "0"}
    assert channels == set(range(0, 40, 4))
    assert list(bn.ShiftDetector(model, layers=1, where="1?").layers) == ["10"]


def test_channels_last_and_large_pictures():
    layer = nn.BatchNorm2d(3).eval()
    x = torch.randn(40, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    with bn.ShiftDetector(layer) as detector:
        layer(x.to(memory_format=torch.channels_last) + 1)
    assert detector.looks[0].z > 3


def test_places_of_a_picture_that_are_not_alike():
    """Every fourth column is bright: some of the columns must not be taken for all."""
    layer = nn.BatchNorm2d(3, momentum=None)
    generator = torch.Generator().manual_seed(0)
    columns = 4.0 * (torch.arange(16) % 4 == 0)

    def batch():
        return torch.randn(32, 3, 16, 16, generator=generator) + columns

    for _ in range(20):
        layer(batch())
    with bn.ShiftDetector(layer.eval(), positions=16) as detector:
        for _ in range(20):
            layer(batch())
    assert not detector.alarm
    assert np.mean([look.z for look in detector.looks]) < 1


def test_one_odd_batch_is_no_alarm():
    model = trained()
    with bn.ShiftDetector(model, run_length=1000) as detector:
        model(draw(32, 20.0, seed=0))
        assert not detector.alarm
        for at in range(8):
            model(draw(32, seed=at))
    assert not detector.alarm
    assert detector.looks[0].sum == pytest.approx(3.5)


def test_what_was_compiled_before_is_told():
    torch._dynamo.reset()  # models of one class share what is compiled
    model, x = trained(), draw(64, 3.0, seed=0)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        with bn.ShiftDetector(compiled) as detector:
            with pytest.warns(RuntimeWarning, match="hears nothing: this model was compiled"):
                compiled(x)
            compiled(x)  # it is told once
    assert not detector.looks
    torch._dynamo.reset()
    fresh = torch.compile(trained(), backend="eager")
    with torch.no_grad(), bn.ShiftDetector(fresh) as detector:
        fresh(x)
    assert len(detector.looks) == 1


def test_calls_with_and_without_inference_mode():
    model, x = trained(), draw(40, seed=0)
    with bn.ShiftDetector(model) as detector:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                model(x)
                model(x[:10])
    assert len(detector.looks) == 4
    assert detector.looks[-1].examples == 190


def test_calls_that_fail_behind_a_layer_are_examples_all_the_same():
    model, x = trained(), draw(16, seed=0)
    head = model[7]
    with bn.ShiftDetector(model) as detector:
        model[7] = nn.Linear(3, 3)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                model(x)
        model[7] = head
        model(x)
    assert [look.examples for look in detector.looks] == [64]


def test_what_is_not_finite_is_not_counted():
    layer = nn.BatchNorm1d(3).eval()
    with bn.ShiftDetector(layer) as detector:
        layer(torch.full((64, 3), math.nan))
        assert not detector.looks
        assert detector.not_finite == 64
        layer(torch.randn(64, 3))
    assert len(detector.looks) == 1
    assert "64 examples, 64 not finite" in repr(detector)


def test_repr_start_and_stop():
    layer = nn.BatchNorm1d(3).eval()
    detector = bn.ShiftDetector(layer, run_length=1000)
    assert repr(detector) == "ShiftDetector: no alarm, 0 examples, sum 0.00 of 5.06"
    with pytest.raises(ValueError, match="there were 0 examples yet: a window is 32"):
        detector.report()
    detector.start()
    with pytest.raises(RuntimeError, match="hears already"):
        detector.start()
    detector.stop()
    detector.stop()
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"window": 4}, "window is 4: expected 8 or more"),
        ({"run_length": 0}, "run_length is 0: expected 1 or more"),
        ({"layers": 0}, "layers is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"positions": 0}, "positions is 0"),
    ],
)
def test_bad_settings(settings, why):
    with pytest.raises(ValueError, match=why):
        bn.ShiftDetector(nn.BatchNorm1d(3), **settings)


def test_a_folded_model():
    with pytest.raises(ValueError, match="as it was before it was folded"):
        bn.ShiftDetector(nn.Linear(3, 3))
