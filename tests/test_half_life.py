"""Momentum as a half-life, and back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.half_life import half_life_of, momentum_from_half_life


@pytest.mark.parametrize("batches", [1, 2, 6.5788, 100, 1e6])
def test_half_of_the_statistics_is_new_after_a_half_life(batches):
    momentum = momentum_from_half_life(batches)
    assert math.isclose((1 - momentum) ** batches, 0.5, rel_tol=1e-9)


def test_statistics_half_way_after_that_many_batches():
    """Ten batches of mean 1 take a running mean of 0 to a half."""
    momentum, running = momentum_from_half_life(10), 0.0
    for _ in range(10):
        running = (1 - momentum) * running + momentum * 1.0
    assert math.isclose(running, 0.5, rel_tol=1e-12)


@given(st.floats(1e-12, 1 - 1e-12))
def test_one_is_the_inverse_of_the_other(momentum):
    assert math.isclose(momentum_from_half_life(half_life_of(momentum)), momentum, rel_tol=1e-9)


def test_the_ends():
    assert (half_life_of(0), half_life_of(1)) == (math.inf, 0.0)
    assert (momentum_from_half_life(math.inf), momentum_from_half_life(0)) == (0.0, 1.0)
    assert momentum_from_half_life(1e-300) == 1.0


def test_a_small_momentum_keeps_its_digits():
    assert math.isclose(half_life_of(1e-15), math.log(2) * 1e15, rel_tol=1e-12)
    assert math.isclose(momentum_from_half_life(math.log(2) * 1e15), 1e-15, rel_tol=1e-12)


@pytest.mark.parametrize("batches", [-1, math.nan, None, "10", True])
def test_what_is_no_half_life(batches):
    with pytest.raises(ValueError, match=r"half-life is .*: expected a number of batches"):
        momentum_from_half_life(batches)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, None, "0.1", False])
def test_what_has_no_half_life(momentum):
    with pytest.raises(ValueError, match=r"momentum is .*: expected a number between 0 and 1"):
        half_life_of(momentum)


def test_numbers_of_numpy():
    assert math.isclose(half_life_of(np.float64(0.5)), 1.0)
    assert math.isclose(momentum_from_half_life(np.float64(1.0)), 0.5)
