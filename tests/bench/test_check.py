"""A wrong result is caught, whoever computes it."""

import math

import pytest
import torch
from bench.small import small_case

from batchnorm.bench.cases import BOTH, DTYPES
from batchnorm.bench.check import check, relative_error
from batchnorm.bench.errors import WrongResult
from batchnorm.bench.problem import Answer, pose


def answer(values):
    return Answer(values.double(), float(values.abs().max()))


def test_the_error_is_relative_to_the_largest_value():
    expected = torch.tensor([[1.0, -4], [2, 0]])
    found = expected + torch.tensor([[0, 0], [0, 0.25]])
    assert relative_error(found, answer(expected)) == 0.0625
    assert relative_error(expected, answer(expected)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error_wherever_it_is(bad):
    expected = torch.ones(100_000)
    for place in (0, 50_000, 99_999):
        found = expected.clone()
        found[place] = bad
        assert not relative_error(found, answer(expected)) < 1


def test_layouts_do_not_matter_and_shapes_do():
    expected = torch.randn(2, 3, 4, 5)
    found = expected.contiguous(memory_format=torch.channels_last)
    assert relative_error(found, answer(expected)) == 0
    assert relative_error(expected, answer(found)) == 0
    with pytest.raises(WrongResult, match="has the shape"):
        relative_error(found.movedim(1, -1), answer(expected))


def _forgets(what, posed):
    """The results of a backward pass that forgets a term of dx; see `bn.reference.backward`."""
    y, dx, dweight, dbias = (found.values.clone() for found in posed.answers[BOTH])
    along = (1, -1, 1, 1)
    m = posed.x.numel() / len(dbias)
    x = posed.x.double()
    var = x.var((0, 2, 3), correction=0).view(along) + 1e-5
    scale = posed.weight.double().view(along) / var.sqrt()
    if what == "mean":
        dx += scale * dbias.view(along) / m
    elif what == "variance":
        xhat = (x - x.mean((0, 2, 3), keepdim=True)) / var.sqrt()
        dx += scale * xhat * dweight.view(along) / m
    elif what == "weight":
        dx /= posed.weight.double().view(along)
    return [t.to(posed.x.dtype) for t in (y, dx)] + [dweight, dbias]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["mean", "variance", "weight"])
def test_a_formula_that_forgets_a_term_is_caught_even_of_a_peer(what, dtype):
    posed = pose(small_case((8, 3, 20, 20), dtype=dtype).problem, [BOTH])
    right = _forgets("nothing", posed)
    assert check("peer", False, posed.problem, right, posed.answers[BOTH]) < 2**-8
    with pytest.raises(WrongResult, match=r"peer is wrong: its dx is off by .* \(8x3x20x20 NCHW"):
        check("peer", False, posed.problem, _forgets(what, posed), posed.answers[BOTH])


def test_ours_may_be_off_by_less():
    posed = pose(small_case((8, 3, 20, 20)).problem, [BOTH])
    found = _forgets("nothing", posed)
    found[1] = found[1] * (1 + 1e-5)
    assert 1e-6 < check("peer", False, posed.problem, found, posed.answers[BOTH]) < 1e-4
    with pytest.raises(WrongResult, match="native is wrong: its dx"):
        check("native", True, posed.problem, found, posed.answers[BOTH])


def test_a_result_too_few_is_an_error():
    posed = pose(small_case().problem, [BOTH])
    with pytest.raises(ValueError, match="zip"):
        check("peer", False, posed.problem, [posed.x], posed.answers[BOTH])
