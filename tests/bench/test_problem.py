"""The inputs are what they are said to be, and the answers are the reference's."""

import numpy as np
import pytest
import torch
from bench.small import small_case

from batchnorm import reference
from batchnorm.bench.cases import BOTH, DTYPES, FORWARD, FUSIONS, INFERENCE, MODES, PLAIN
from batchnorm.bench.problem import pose

SHAPES = [((16, 5), "NC"), ((4, 3, 7, 5), "NHWC"), ((4, 3, 7), "NCL"), ((2, 3, 4, 5, 3), "NDHWC")]


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_answers_are_the_references(shape, layout, fusion, dtype):
    posed = pose(small_case(shape, layout, dtype, fusion).problem, MODES)
    x, dy, weight, bias, mean, var = (
        t.double().numpy()
        for t in (
            posed.x,
            posed.dy,
            posed.weight,
            posed.bias,
            posed.running_mean,
            posed.running_var,
        )
    )
    options = {
        "activation": None if fusion == PLAIN else "relu",
        "residual": None if posed.residual is None else posed.residual.double().numpy(),
    }
    y = reference.forward(x, weight, bias, **options)
    gradients = reference.backward(dy, x, weight, bias, **options)
    expected = {
        FORWARD: [y],
        BOTH: [y, *gradients] if posed.residual is not None else [y, *gradients[:3]],
        INFERENCE: [reference.forward(x, weight, bias, running=(mean, var), **options)],
    }
    assert posed.answers.keys() == expected.keys()
    for mode, answers in posed.answers.items():
        assert len(answers) == len(expected[mode])
        for answer, wanted in zip(answers, expected[mode], strict=True):
            np.testing.assert_allclose(answer.values.numpy(), wanted, rtol=1e-11, atol=1e-11)
            assert answer.largest == answer.values.abs().max()


def test_the_inputs_have_the_type_and_the_layout_and_are_the_same_each_time():
    case = small_case((4, 3, 7, 5), "NHWC", "bfloat16", "residual+relu")
    posed, again = pose(case.problem, MODES), pose(case.problem, MODES)
    for batch in (posed.x, posed.dy, posed.residual):
        assert batch.dtype == torch.bfloat16
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(posed.x, again.x)
    assert torch.equal(posed.dy, again.dy)


def test_the_gradient_has_a_mean_and_is_zero_at_the_kink():
    posed = pose(small_case((64, 3, 9, 9)).problem, [BOTH])
    plain = pose(small_case((64, 3, 9, 9), fusion=PLAIN).problem, [BOTH])
    z = plain.answers[BOTH][0].values
    near = z.abs() < 1e-3
    assert near.any()
    assert torch.equal(posed.dy == 0, near)
    assert (plain.dy != 0).all()
    assert (plain.dy.mean((0, 2, 3)) > 0.5 + 0.5 * plain.x.mean((0, 2, 3)) - 0.1).all()


def test_only_what_is_asked_for_is_solved():
    assert pose(small_case().problem, [INFERENCE]).answers.keys() == {INFERENCE}
    assert pose(small_case().problem, [FORWARD]).answers.keys() == {FORWARD}
