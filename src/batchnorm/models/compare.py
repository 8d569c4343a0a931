"""Two outputs of a model, compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def largest_error(expected: Any, actual: Any) -> float:
    """Return by how much two outputs of a model differ.

        max over the tensors of (max |actual - expected| / max |expected|)

    All floating-point numbers in the outputs are compared, as float64: tensors and Python's own, in
    lists, tuples, dictionaries and what else torch knows as a tree. Where both have the same
    infinity, or both NaN, they are equal; where only one has, the error is infinite. Beside a
    tensor of zeros the difference itself counts. Of other tensors the shapes are compared.

    Args:
        expected: The output that is right.
        actual: The other.

    Returns:
        The largest relative error, 0 or more.

    Raises:
        ValueError: The outputs have not the same structure or shapes, or no floating-point number
            that is finite.

    Example:
        >>> import torch
        >>> largest_error([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 3.0])])
        0.25
    """
    leaves, structure = pytree.tree_flatten_with_path(expected)
    others, other = pytree.tree_flatten(actual)
    if structure != other:
        raise ValueError(f"the outputs are not alike: expected {structure}, got {other}")
    largest, compared = 0.0, False
    for (path, leaf), found in zip(leaves, others, strict=True):
        at = f"output{pytree.keystr(path)}"
        right, wrong = _numbers(leaf), _numbers(found)
        if (right is None) != (wrong is None):
            raise ValueError(
                f"{at} is not alike: expected a {type(leaf).__name__}, got a {type(found).__name__}"
            )
        if right is None or wrong is None:
            continue
        if right.shape != wrong.shape:
            raise ValueError(
                f"{at} is not alike: expected shape {tuple(right.shape)}, got {tuple(wrong.shape)}"
            )
        if right.is_floating_point() or right.is_complex():
            compared |= right.numel() == 0 or bool(right.isfinite().any())
            largest = max(largest, _error(right, wrong))
    if not compared and largest == 0:
        raise ValueError(
            "the outputs have no floating-point number that could be compared, or none is finite"
        )
    return largest


def default_tolerance(values: Any) -> float:
    """Return how large the error of a model may be that computes the same in another order.

    Args:
        values: Parameters and outputs; the coarsest floating-point type among them counts.
    """
    types = {leaf.dtype for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
    return max((_TOLERANCES[dtype] for dtype in types & _TOLERANCES.keys()), default=1e-4)


def _numbers(leaf: Any) -> Tensor | None:
    """Return a leaf as a tensor, or None where it has no numbers."""
    if isinstance(leaf, float):
        return torch.tensor(leaf, dtype=torch.float64)
    return leaf.detach() if isinstance(leaf, Tensor) else None


def _error(expected: Tensor, actual: Tensor) -> float:
    """Return the relative error of one tensor."""
    wide = torch.complex128 if expected.is_complex() or actual.is_complex() else torch.float64
    expected, actual = expected.to("cpu", wide), actual.to("cpu", wide)
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, 0, actual - expected).abs()
    if not bool(difference.isfinite().all()):
        return float("inf")
    size = expected[expected.isfinite()].abs().max().item()
    return float(difference.max().item() / (size or 1))
