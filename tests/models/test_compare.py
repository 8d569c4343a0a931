import math
from collections import namedtuple

import pytest
import torch

from batchnorm.models.compare import default_tolerance, largest_error

inf, nan = math.inf, math.nan


def _of(*values, **settings):
    return torch.tensor(values, **settings)


def test_error_is_relative_to_the_largest_value_of_each_tensor():
    expected = {"a": _of(1.0, -200.0), "b": (_of(0.1), 2.0, "name", None)}
    actual = {"a": _of(2.0, -200.0), "b": (_of(0.1), 2.5, "name", None)}

    assert largest_error(expected, actual) == 0.25
    assert largest_error(expected["a"], actual["a"]) == 1 / 200


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, nan, inf], [1.0, nan, inf], 0),
        ([2.0, nan, inf], [1.0, nan, inf], 0.5),
        ([1.0, nan], [1.0, 1.0], inf),
        ([nan, nan], [1.0, 1.0], inf),
        ([1.0, 1.0], [1.0, nan], inf),
        ([inf, 1.0], [-inf, 1.0], inf),
        ([1e300, 1.0], [inf, 1.0], inf),
        ([0.0, 0.0], [0.0, 1e-9], 1e-9),
        ([], [], 0),
    ],
)
def test_error_of_special_values(expected, actual, error):
    as_tensors = [torch.tensor(v, dtype=torch.float64) for v in (expected, actual)]

    assert largest_error(*as_tensors) == error


def test_types_are_compared_as_numbers():
    assert largest_error(_of(1.0, 3.0, dtype=torch.bfloat16), _of(1.0, 3.0)) == 0
    assert largest_error(_of(3 + 4j), _of(3 + 3j)) == 0.2
    assert largest_error((_of(1.0), _of(1, 2)), (_of(1.0), _of(1, 3))) == 0


Pair = namedtuple("Pair", "one two")


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        (Pair(_of(1.0), _of(1.0)), (_of(1.0), _of(1.0)), "the outputs are not alike: expected"),
        ({"a": _of(1.0)}, {"b": _of(1.0)}, "the outputs are not alike"),
        ([_of(1.0)], [None], r"output\[0\] is not alike: expected a Tensor, got a NoneType"),
        ({"a": _of(1.0)}, {"a": _of(1.0, 1.0)}, r"output\['a'\].*shape \(1,\), got \(2,\)"),
        ([_of(1.0), _of(1)], [_of(1.0), _of(1, 2)], r"output\[1\].*shape \(1,\), got \(2,\)"),
        (_of(1, 2), _of(1, 2), "have no floating-point number"),
        (_of(nan, inf), _of(nan, inf), "or none is finite"),
    ],
)
def test_outputs_that_cannot_be_compared_raise(expected, actual, message):
    with pytest.raises(ValueError, match=message):
        largest_error(expected, actual)


def test_the_tolerance_is_that_of_the_coarsest_type():
    assert default_tolerance([_of(1.0), {"a": _of(1)}]) == 1e-4
    assert default_tolerance([_of(1.0, dtype=torch.float64)]) == 1e-10
    assert default_tolerance([_of(1.0), _of(1.0, dtype=torch.float16)]) == 1e-2
    assert default_tolerance([2.0]) == 1e-4
