"""Each shift does what its line in the table says, to nothing but a copy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchnorm.study.data import load
from batchnorm.study.shifts import KINDS, SEVERITIES, SHIFTS, _Setting, applies, shift

PICTURES = np.random.default_rng(0).random((6, 3, 9, 7), np.float32)
PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def digits():
    return load("digits").test_inputs


def smooth(height, width):
    """Coloured waves, from 0 to 1: pictures like photographs, without noise."""
    row, column = np.indices((height, width))
    waves = [np.sin(row * a / height + column * b / width) for a, b in ((9, 4), (2, 7), (5, 1))]
    return np.float32(waves)[None] / 2 + 0.5


def distance(shifted, inputs):
    return np.abs(shifted - inputs).mean()


@pytest.mark.parametrize("name", SHIFTS)
class TestEvery:
    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_keeps_shape_type_range_and_its_input(self, name, severity):
        inputs = PICTURES * 5 - 2
        low, high = inputs.min(), inputs.max()
        kept = inputs.copy()
        shifted = shift(inputs, name, severity, low=np.float64(low), high=np.float64(high))
        np.testing.assert_array_equal(inputs, kept)
        assert not np.shares_memory(shifted, inputs)
        assert (shifted.shape, shifted.dtype) == (inputs.shape, np.float32)
        assert low <= shifted.min() <= shifted.max() <= high
        again = shift(inputs, name, severity, low=low, high=high)
        np.testing.assert_array_equal(shifted, again)

    def test_grows_with_the_severity(self, name, digits):
        for inputs in (digits, smooth(32, 32)):
            shifted = [shift(inputs, name, severity, low=0, high=1) for severity in SEVERITIES]
            distances = [0, *(distance(each, inputs) for each in shifted)]
            assert (np.diff(distances) > 1e-3).all()

    def test_begins_with_nothing(self, name):
        kind = KINDS[SHIFTS.index(name)]
        setting = _Setting(kind.none, low=0, high=1, seed=0)
        np.testing.assert_allclose(kind.change(PICTURES, setting), PICTURES, atol=1e-6)
        near = kind.none + (kind.amounts[0] - kind.none) / 100
        assert distance(kind.change(PICTURES, replace(setting, amount=near)), PICTURES) < 0.01

    def test_commutes_with_a_change_of_units(self, name):
        shifted = shift(PICTURES, name, 3, low=0, high=1)
        inputs = 255 * PICTURES - 100
        np.testing.assert_allclose(
            shift(inputs, name, 3, low=-100, high=155), 255 * shifted - 100, atol=1e-3
        )

    def test_takes_each_example_by_itself(self, name):
        whole = shift(PICTURES, name, 4, low=0, high=1)
        np.testing.assert_array_equal(shift(PICTURES[:2], name, 4, low=0, high=1), whole[:2])

    def test_knows_features(self, name):
        features = PICTURES.reshape(-1, 21, 1, 1)
        assert applies(name, (3, 9, 7))
        assert applies(name, (21, 1, 1)) == (name not in ("blur", "rotation"))
        assert applies(name, (1, 9, 1)) == applies(name, (1, 1, 9)) == applies(name, (21, 1, 1))
        if applies(name, (21, 1, 1)):
            shifted = shift(features, name, 5, low=0, high=1)
            assert (shifted.shape, shifted.dtype) == (features.shape, np.float32)
        else:
            with pytest.raises(ValueError, match=f"{name}: got .*, H and W above 1"):
                shift(features, name, 5, low=0, high=1)


@pytest.mark.parametrize(("severity", "amount"), list(enumerate((0.1, 0.2, 0.3, 0.4, 0.5), 1)))
def test_brightness(severity, amount):
    shifted = shift(PICTURES, "brightness", severity, low=0, high=2)
    np.testing.assert_allclose(shifted, np.minimum(PICTURES + 2 * amount, 2), rtol=1e-6)


@pytest.mark.parametrize(("severity", "factor"), list(enumerate((0.75, 0.5, 0.35, 0.2, 0.1), 1)))
def test_contrast(severity, factor):
    shifted = shift(PICTURES, "contrast", severity, low=0, high=1).reshape(6, -1)
    flat = PICTURES.reshape(6, -1)
    np.testing.assert_allclose(shifted.mean(1), flat.mean(1), rtol=1e-5)
    np.testing.assert_allclose(shifted.std(1), factor * flat.std(1), rtol=1e-5)


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate((0.08, 0.12, 0.18, 0.26, 0.38), 1)))
def test_noise(severity, sigma):
    grey = np.full((50, 1, 32, 32), 0.5, np.float32)
    noise = shift(grey, "noise", severity, low=-9.5, high=10.5) - grey
    assert noise.mean() == pytest.approx(0, abs=20 * sigma * 0.02)
    quartile = 0.6745 * 20 * sigma  # the standard deviation, too, would feel the clipping
    assert np.median(np.abs(noise)) == pytest.approx(quartile, rel=0.02)
    inside = noise[np.abs(noise) < 10]
    assert np.unique(inside).size > 0.9 * inside.size


def test_noise_is_another_one_for_another_seed():
    first, second = (shift(PICTURES, "noise", 1, low=0, high=1, seed=seed) for seed in (0, 1))
    assert (first != second).mean() > 0.9


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur(severity):
    constant = np.full((2, 3, 8, 8), 0.7, np.float32)
    np.testing.assert_allclose(shift(constant, "blur", severity, low=0, high=1), constant, 1e-6)
    point = np.zeros((2, 1, 41, 41), np.float32)
    point[0, 0, 20, 20] = 1
    spread = shift(point, "blur", severity, low=0, high=1)
    assert spread.sum() == pytest.approx(1, rel=1e-5)
    assert not spread[1].any()  # no example reaches into another
    variance = (spread[0, 0].sum(0) * (np.arange(41) - 20) ** 2).sum()
    assert variance == pytest.approx((KINDS[3].amounts[severity - 1] * 41) ** 2, rel=0.02)


def test_inversion():
    shifted = shift(PICTURES, "inversion", 5, low=-1, high=3)
    np.testing.assert_array_equal(shifted, 2 - PICTURES)
    fifth = shift(PICTURES, "inversion", 1, low=-1, high=3)
    np.testing.assert_allclose(fifth, 0.8 * PICTURES + 0.2 * (2 - PICTURES), rtol=1e-5)


@pytest.mark.parametrize("size", [3, 8])
def test_rotation_by_a_right_angle(size):
    inputs = np.arange(2 * 2 * size * size, dtype=np.float32).reshape(2, 2, size, size)
    shifted = shift(inputs, "rotation", 5, low=0, high=inputs.max())
    np.testing.assert_allclose(shifted, np.rot90(inputs, axes=(2, 3)), atol=1e-4)


def test_rotation_takes_the_nearest_value_from_outside():
    bright = np.full((1, 1, 8, 8), 0.7, np.float32)
    for severity in SEVERITIES:
        np.testing.assert_allclose(shift(bright, "rotation", severity, low=0, high=1), bright)


def test_features_are_not_clipped():
    features = np.ones((2, 3, 1, 1), np.float32)
    shifted = shift(features, "brightness", 5, low=0, high=1)
    np.testing.assert_array_equal(shifted, features * 1.5)


@pytest.mark.parametrize(
    ("inputs", "name", "severity", "words"),
    [
        (PICTURES, "fog", 1, "got the shift 'fog', expected one of brightness, contrast, noise, "),
        (PICTURES, "noise", 0, r"got the severity 0, expected one of \(1, 2, 3, 4, 5\)"),
        (PICTURES, "noise", 6, "got the severity 6"),
        (PICTURES, "noise", 1.5, "got the severity 1.5"),
        (PICTURES[0], "noise", 1, r"noise: got inputs of shape \(3, 9, 7\), expected \(N, C, H, W"),
    ],
)
def test_what_is_refused(inputs, name, severity, words):
    with pytest.raises(ValueError, match=words):
        shift(inputs, name, severity, low=0, high=1)
    if name == "fog":
        with pytest.raises(ValueError, match=words):
            applies(name, (1, 8, 8))


def test_the_table_of_the_documentation():
    rows = [f"| {kind.name} | {kind.meaning} | {_joined(kind.amounts)} |" for kind in KINDS]
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8")
    assert [len(kind.amounts) for kind in KINDS] == [len(SEVERITIES)] * len(SHIFTS)


def _joined(amounts):
    return " | ".join(f"{amount:g}" for amount in amounts)
