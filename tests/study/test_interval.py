"""Intervals: the centre that they should have, and as wide as they say."""

import numpy as np
import pytest

from batchnorm.study.interval import Interval, difference, ratio, short


def test_equal_ratios_have_no_spread():
    interval = ratio([30, 60, 3], [10, 20, 1])
    assert [interval.value, interval.low, interval.high] == pytest.approx([3, 3, 3])
    assert str(interval) == "3× (3–3)"


def test_the_mean_of_ratios_is_geometric():
    assert ratio([1, 100], [1, 1]).value == pytest.approx(10)
    assert ratio([1, 100, 1], [1, 1, 1], robust=True).value == pytest.approx(1)


def test_differences_are_of_pairs():
    interval = difference([3, 14, 105], [1, 12, 103], " points")
    assert [interval.value, interval.low, interval.high] == pytest.approx([2, 2, 2])
    assert str(interval) == "+2 points (+2 to +2)"
    assert difference([1, 3], [2]).value == 0
    assert str(Interval(-0.5, -1, 0, "%")) == "-0.5% (-1 to 0)"


@pytest.mark.parametrize("count", [5, 30])
def test_the_interval_covers_as_often_as_it_says(count):
    random = np.random.default_rng(1)
    draws = random.normal(0.5, 1.0, (400, count))
    for of, centre in (
        ([ratio(np.exp(draw), np.ones(count)) for draw in draws], np.exp(0.5)),
        ([difference(draw, [0]) for draw in draws], 0.5),
    ):
        covered = np.mean([each.low <= centre <= each.high for each in of])
        assert 0.91 <= covered <= 0.98


def test_numbers_are_short():
    assert [short(value) for value in (0.0, 1.0, 12.345, 12345.6, 3e-9, 2e7)] == [
        *("0", "1", "12.3", "12346", "3e-09", "2e+07"),
    ]
