"""The arithmetic: a folded map is the map and the batch norm, one after the other, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close
from torch import nn

from batchnorm import reference
from batchnorm.models.fold.arithmetic import Folding, scale_and_shift
from batchnorm.models.fold.graph import Map, Norm, Value


def norm_of(channels, affine=("weight", "bias")):
    """Return a batch norm and its tensors, in float32."""
    tensors = {
        "mean": torch.randn(channels) * 3,
        "var": torch.rand(channels) * 2 + 0.1,
        **{name: torch.randn(channels) for name in affine},
    }
    names = tuple(name if name in tensors else None for name in ("mean", "var", "weight", "bias"))
    return Norm("batch_norm", 0, [Value()], Value(), names=names, eps=1e-3), tensors


@pytest.mark.parametrize("affine", [("weight", "bias"), ("weight",), ("bias",), ()], ids=str)
def test_a_batch_norm_is_a_scale_and_a_shift(affine):
    norm, tensors = norm_of(5, affine)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    scale, shift = scale_and_shift(norm, tensors)
    x = torch.randn(7, 5, dtype=torch.float64)
    moments = reference.Moments(1, wide["mean"].numpy(), wide["var"].numpy())
    xhat = (x.numpy() - moments.mean) / np.sqrt(moments.var() + norm.eps)
    expected = xhat * np.asarray(wide.get("weight", 1.0)) + np.asarray(wide.get("bias", 0.0))
    assert_close(x * scale + shift, expected, torch.float64)


LINEAR = {
    "linear": lambda bias: nn.Linear(4, 6, bias),
    "conv1d": lambda bias: nn.Conv1d(4, 6, 3, bias=bias),
    "conv2d, grouped": lambda bias: nn.Conv2d(4, 6, (2, 3), groups=2, bias=bias),
    "conv2d, depthwise": lambda bias: nn.Conv2d(4, 12, 3, groups=4, bias=bias),
    "conv3d": lambda bias: nn.Conv3d(4, 6, 2, bias=bias),
    "transposed 1d": lambda bias: nn.ConvTranspose1d(4, 6, 3, 2, bias=bias),
    "transposed 2d, grouped": lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias),
    "transposed 3d, depthwise": lambda bias: nn.ConvTranspose3d(4, 8, 2, groups=4, bias=bias),
    "transposed 2d, of one value": lambda bias: nn.ConvTranspose2d(4, 6, 1, groups=2, bias=bias),
}


@given(
    kind=st.sampled_from(sorted(LINEAR)),
    bias=st.booleans(),
    before=st.booleans(),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 99),
)
def test_a_folded_map_is_both_one_after_the_other(kind, bias, before, layout, seed):
    torch.manual_seed(seed)
    layer = LINEAR[kind](bias).double()
    if layer.weight.ndim == 4:
        layer = layer.to(memory_format=layout)
    transposed = kind.startswith("transposed")
    inputs, outputs = (4, layer(torch.zeros(1, 4, 5, 5, 5)[_positions(layer)].double()).shape[1])
    norm, tensors = norm_of(inputs if before else outputs)
    scale, shift = scale_and_shift(norm, tensors)
    if before and transposed and "of one value" not in kind:
        shift = torch.zeros_like(shift)  # or else no weight and bias would do
    op = Map("", 0, [Value()], Value(), weight="w", bias="b" if bias else None)
    op.groups, op.transposed = getattr(layer, "groups", 1), transposed
    folding = Folding(op, {"w": layer.weight, "b": layer.bias})
    folding.fold(scale, shift, before)
    x = torch.randn(2, 4, 5, 5, 5, dtype=torch.float64)[_positions(layer)]
    with torch.no_grad():
        expected = _affine(layer(_affine(x, scale, shift)), None, None) if before else None
        if not before:
            expected = _affine(layer(x), scale, shift)
        layer.weight.copy_(folding.weight)
        layer.bias = None if folding.bias is None else nn.Parameter(folding.bias)
        assert_close(layer(x), expected, torch.float64, "sum")


def _positions(layer):
    """Return what takes of a batch of volumes as many dimensions as a layer has."""
    return (..., *[0] * (5 - max(layer.weight.ndim, 2)))


def _affine(x, scale, shift):
    if scale is None:
        return x
    over = (-1, *[1] * (x.ndim - 2))
    return x * scale.view(over) + shift.view(over)


def test_what_was_folded_is_folded_on():
    layer, first, second = nn.Linear(4, 3).double(), norm_of(4), norm_of(3)
    op = Map("", 0, [Value()], Value(), weight="w", bias="b")
    folding = Folding(op, {"w": layer.weight, "b": layer.bias})
    before = folding.copy()
    maps = [scale_and_shift(*first), scale_and_shift(*second)]
    folding.fold(*maps[1], before=False)
    folding.fold(*maps[0], before=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = _affine(layer(_affine(x, *maps[0])), *maps[1])
    assert_close(x @ folding.weight.T + folding.bias, expected, torch.float64, "sum")
    assert_close(x @ before.weight.T + before.bias, layer(x), torch.float64, "sum")


def test_it_is_rounded_once_and_knows_what_does_not_fit():
    op = Map("", 0, [Value()], Value(), weight="w")
    folding = Folding(op, {"w": torch.tensor([[300.0]], dtype=torch.float16)})
    folding.fold(torch.tensor([200.0]).double(), torch.tensor([1.0]).double(), before=False)
    assert folding.weight.item() == 6e4
    assert folding.is_finite()
    folding.fold(torch.tensor([2.0]).double(), torch.tensor([0.0]).double(), before=False)
    assert not folding.is_finite()


def test_no_bias_is_made_where_none_is_needed():
    op = Map("", 0, [Value()], Value(), weight="w")
    folding = Folding(op, {"w": torch.ones(2, 3)})
    folding.fold(torch.ones(3).double() * 2, torch.zeros(3).double(), before=True)
    assert folding.bias is None
