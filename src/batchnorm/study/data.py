"""The data a study trains on: checked once, when it is loaded.

Whatever is wrong with a user's files is a `DataError` of one line, and nothing else.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from batchnorm.study.errors import DataError as DataError
from batchnorm.study.errors import reading, wrong
from batchnorm.study.formats import Array, Part, read_cifar10, read_mnist, read_npz

_Inputs: TypeAlias = NDArray[np.float32]
_Labels: TypeAlias = NDArray[np.int64]

_FORMS = {"digits": "digits", "mnist": "mnist:DIR", "cifar10": "cifar10:DIR", "npz": "npz:FILE"}
_READERS = {"mnist": read_mnist, "cifar10": read_cifar10, "npz": read_npz}


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
    train_labels: _Labels
    test_inputs: _Inputs
    test_labels: _Labels
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


def load(spec: str) -> DataSet:
    """Load the data set that a command line names.

    Args:
        spec: One of

            - `digits`: the 8x8 digits that come with scikit-learn;
            - `mnist:DIR`: a folder with four IDX files, each compressed with gzip or not;
            - `cifar10:DIR`: the folder of CIFAR-10's binary or Python version, or its parent;
            - `npz:FILE`: arrays `train_inputs`, `train_labels`, `test_inputs`, `test_labels`, or
              `x_train`, `y_train`, `x_test`, `y_test`; or `inputs`, `labels`, or `x`, `y`, of which
              a fifth of each class is kept for the test. Inputs have the shape (N, F), (N, H, W),
              (N, C, H, W), or (N, H, W, C) if C is 1, 3 or 4 and H is not. Features get the shape
              (F, 1, 1). `uint8` is divided by 255; floats are kept as they are.

    Returns:
        The data, checked.

    Raises:
        DataError: For whatever is wrong with `spec` or with the files.

    Example:
        >>> load("digits")
        DataSet(digits: 1437 training and 360 test examples of shape (1, 8, 8), 10 classes)
    """
    kind, _, place = spec.partition(":")
    form = _FORMS.get(kind)
    if form is None:
        near = difflib.get_close_matches(kind.lower(), _FORMS, n=1)
        way_out = f"did you mean {_FORMS[near[0]]}?" if near else "name one of these"
        raise wrong(spec, "unknown data", ", ".join(_FORMS.values()), way_out)
    if bool(place) != (":" in form):
        raise wrong(spec, "a path" if place else "no path", f"the form {form}", f"give {form}")
    if kind == "digits":
        return _data_set(kind, kind, _digits())
    path = Path(place)
    with reading(path):
        path = path.expanduser()
        if not path.exists():
            raise wrong(path, "no such path", form, "check the spelling")
        if form.endswith("DIR") and not path.is_dir():
            raise wrong(path, "a file", f"a directory, {form}", "name the folder of the files")
        if form.endswith("FILE") and not path.is_file():
            raise wrong(path, "no regular file", f"a file, {form}", "name the file itself")
        return _data_set(path.stem if kind == "npz" else kind, path, _READERS[kind](path))


def _digits() -> list[Part]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        way_out = 'pip install "batchnorm[study]", or name other data'
        raise wrong("digits", str(error), "scikit-learn, which brings them", way_out) from error
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8) / 16
    return [("digits", images), ("digits", labels)]


def _data_set(name: str, where: object, parts: list[Part]) -> DataSet:
    """Check inputs and labels, of training and test or of both together, and join them."""
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
    if train_y.max() >= len(train_y):
        got = f"the label {train_y.max()} among {len(train_y)} training examples"
        raise wrong(where, got, "fewer classes than examples", "number the classes 0, 1, 2, ...")
    if train_y.min() == train_y.max():
        got = f"one class only, {train_y[0]}, to train on"
        raise wrong(where, got, "two or more", "add examples of another class")
    strange = np.setdiff1d(test_y, train_y)
    if len(strange):
        got = f"the test label {strange[0]}, which training does not have"
        raise wrong(where, got, "labels that training has", "split the data anew")
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


def _labels(where: object, array: Array, of: Part) -> _Labels:
    """Give labels the shape (N,) and the type int64."""
    if array.dtype.kind not in "iu":
        raise wrong(where, f"labels of type {array.dtype.name}", "integers", "number the classes")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise wrong(where, f"labels of shape {array.shape}", "the shape (N,)", "reshape them")
    place, inputs = of
    if len(array) != len(inputs):
        raise wrong(where, f"{len(array)} labels", f"{len(inputs)}, the inputs of {place}")
    labels = array.astype(np.int64)
    if labels.min() < 0:
        got = f"the negative label {labels.min()}"
        raise wrong(where, got, "0 or more", "number the classes 0, 1, 2, ...")
    return labels


def _every_fifth(where: object, labels: _Labels) -> NDArray[np.bool_]:
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
