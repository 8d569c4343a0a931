"""Labelled examples: the arrays that a reader returns, checked and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from batchnorm.study.errors import wrong
from batchnorm.study.formats import Array, Part

_Inputs: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """Labelled examples, to train on and to test with.

    Attributes:
        name: What tables and plots call it.
        train_inputs: Shape (N, C, H, W), float32; pixels are scaled to [0, 1].
        train_labels: Shape (N,), int64, from 0 to `classes` - 1.
        test_inputs: Shape (M, C, H, W), like `train_inputs`.
        test_labels: Shape (M,), like `train_labels`.
        classes: The number of outputs that a network needs.
    """

    name: str
    train_inputs: _Inputs
    train_labels: NDArray[np.int64]
    test_inputs: _Inputs
    test_labels: NDArray[np.int64]
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one example."""
        _, channels, height, width = self.train_inputs.shape
        return channels, height, width

    def __repr__(self) -> str:
        return (
            f"DataSet({self.name}: {len(self.train_labels)} training and {len(self.test_labels)} "
            f"test examples of shape {self.shape}, {self.classes} classes)"
        )


def joined(name: str, where: object, parts: Sequence[Part]) -> DataSet:
    """Check inputs and labels, and join them into a data set.

    Args:
        name: What tables and plots call it.
        where: The place that an error names if it is no single array's.
        parts: Inputs and labels, of training and of test; or of both together, of which a fifth of
            each class is kept for the test. Each array comes after the place that an error names.
            Inputs have the shape (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C). Labels are
            integers from 0, or text, whose classes are numbered in sorted order.

    Returns:
        The data, checked.

    Raises:
        DataError: For whatever is wrong with the arrays.

    Example:
        >>> inputs, labels = np.zeros((10, 8, 8)), np.array(["cat", "dog"] * 5)
        >>> joined("pets", "here", [("here", inputs), ("here", labels)])
        DataSet(pets: 8 training and 2 test examples of shape (1, 8, 8), 2 classes)
    """
    if len(parts) not in (2, 4):
        expected = "inputs and labels, of training and test or of both together"
        raise wrong(where, f"{len(parts)} arrays", expected, "correct what reads them")
    train_x, train_y = _inputs(*parts[0]), _labels(*parts[1], of=parts[0])
    if len(parts) == 4:
        test_x, test_y = _inputs(*parts[2]), _labels(*parts[3], of=parts[2])
    else:
        test = _every_fifth(where, train_y)
        test_x, test_y = train_x[test], train_y[test]
        train_x, train_y = train_x[~test], train_y[~test]
    if train_x.shape[1:] != test_x.shape[1:]:
        got, expected = f"test inputs of shape {test_x.shape[1:]}", f"{train_x.shape[1:]}"
        raise wrong(where, got, f"{expected} as in training", "give both the same shape")
    if train_y.dtype.kind != test_y.dtype.kind:
        raise wrong(where, "both text and numbers as labels", "one of them", "number the classes")
    if (train_y == train_y[0]).all():
        got = f"one class only, {train_y[0]}, to train on"
        raise wrong(where, got, "two or more", "add examples of another class")
    strange = np.setdiff1d(test_y, train_y)
    if len(strange):
        got = f"the test label {strange[0]}, which training does not have"
        raise wrong(where, got, "labels that training has", "split the data anew")
    if train_y.dtype.kind == "U":
        names = np.unique(train_y)
        train_y, test_y = np.searchsorted(names, train_y), np.searchsorted(names, test_y)
    if train_y.max() >= len(train_y):
        got = f"the label {train_y.max()} among {len(train_y)} training examples"
        raise wrong(where, got, "fewer classes than examples", "number the classes 0, 1, 2, ...")
    return DataSet(name, train_x, train_y, test_x, test_y, int(train_y.max()) + 1)


def _inputs(where: object, array: Array) -> _Inputs:
    """Give inputs the shape (N, C, H, W) and the type float32."""
    if not 2 <= array.ndim <= 4:
        expected = "(N, F), (N, H, W), (N, C, H, W) or (N, H, W, C)"
        raise wrong(where, f"inputs of shape {array.shape}", expected, "reshape them")
    if array.size == 0:
        raise wrong(where, f"empty inputs, of shape {array.shape}", "one example or more")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise wrong(where, f"inputs of type {array.dtype.name}", "uint8 or floats", "convert them")
    if array.ndim == 2:
        array = array[:, :, None, None]
    elif array.ndim == 3:
        array = array[:, None]
    elif array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        inputs = array.astype(np.float32, order="C")
    if array.dtype == np.uint8:
        inputs /= 255
    if not np.isfinite(inputs).all():
        got = "inputs that are NaN, infinite or too large"
        raise wrong(where, got, "finite float32 values", "remove or replace them")
    return inputs


def _labels(where: object, array: Array, of: Part) -> Array:
    """Give labels the shape (N,), and the type int64 if they are numbers."""
    if array.dtype.kind not in "iuU":
        got = f"labels of type {array.dtype.name}"
        raise wrong(where, got, "integers or text", "number the classes")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise wrong(where, f"labels of shape {array.shape}", "the shape (N,)", "reshape them")
    place, inputs = of
    if len(array) != len(inputs):
        raise wrong(where, f"{len(array)} labels", f"{len(inputs)}, the inputs of {place}")
    if array.dtype.kind == "U":
        return array
    labels = array.astype(np.int64)
    if labels.min() < 0:
        got = f"the negative label {labels.min()}"
        raise wrong(where, got, "0 or more", "number the classes 0, 1, 2, ...")
    return labels


def _every_fifth(where: object, labels: Array) -> NDArray[np.bool_]:
    """Choose a fifth of each class, always the same one."""
    numbers, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        got = f"one example with the label {numbers[counts.argmin()]}"
        raise wrong(where, got, "two or more, to split them", "add one, or give a test set too")
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each one shuffled
    chosen = np.zeros(len(labels), bool)
    chosen[order[::5]] = True
    return chosen
