"""The forms that data comes in, and the loading of what a command line names.

Whatever is wrong with a user's files is a `DataError` of one line, and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from batchnorm.study.cifar import read_cifar10, read_cifar100
from batchnorm.study.errors import DataError as DataError
from batchnorm.study.errors import needing, reading, wrong
from batchnorm.study.examples import DataSet as DataSet
from batchnorm.study.examples import joined
from batchnorm.study.formats import Part as Part
from batchnorm.study.formats import read_mnist, read_npz
from batchnorm.study.images import read_images
from batchnorm.study.tables import read_csv


@dataclass(frozen=True)
class DataForm:
    """A form that data comes in.

    Attributes:
        kind: What stands before the colon on a command line.
        place: What stands behind it: a folder, a file, or nothing.
        read: Reads the place, a path that exists and is of that sort; where `place` is empty, it
            gets an empty path, which means nothing. It returns inputs and labels, of training and
            of test; or inputs and labels alone, of which a fifth of each class is kept for the
            test. Each is a NumPy array, after the place that an error names. Inputs are as in an
            `npz` file, and labels are integers from 0, or text. What it raises becomes a
            `DataError`.
        titled: Whether the data are called as their file or folder is, and not as the form.

    Example:
        >>> import numpy as np
        >>> def read(path):
        ...     inputs = np.random.default_rng(0).random((100, 1, 8, 8))
        ...     return [("stripes", inputs), ("stripes", np.arange(100) % 4)]
        >>> load("stripes", extra=[DataForm("stripes", "", read)])
        DataSet(stripes: 80 training and 20 test examples of shape (1, 8, 8), 4 classes)
    """

    kind: str
    place: Literal["", "DIR", "FILE"]
    read: Callable[[Path], list[Part]]
    titled: bool = False

    @property
    def spelling(self) -> str:
        """What a command line says, as in `mnist:DIR`."""
        return f"{self.kind}:{self.place}" if self.place else self.kind


def _read_digits(_: Path) -> list[Part]:
    with needing("digits", "scikit-learn, which brings them"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8) / 16
    return [("digits", images), ("digits", labels)]


FORMS: tuple[DataForm, ...] = (
    DataForm("digits", "", _read_digits),
    DataForm("mnist", "DIR", read_mnist),
    DataForm("fashion-mnist", "DIR", read_mnist),
    DataForm("cifar10", "DIR", read_cifar10),
    DataForm("cifar100", "DIR", read_cifar100),
    DataForm("npz", "FILE", read_npz, titled=True),
    DataForm("csv", "FILE", read_csv, titled=True),
    DataForm("images", "DIR", read_images, titled=True),
)


def load(spec: str, extra: Sequence[DataForm] = ()) -> DataSet:
    """Load the data set that a command line names.

    Args:
        spec: One of

            - `digits`: the 8x8 digits that come with scikit-learn;
            - `mnist:DIR`, `fashion-mnist:DIR`: a folder with four IDX files, each compressed with
              gzip or not;
            - `cifar10:DIR`, `cifar100:DIR`: the folder of the binary or the Python version, or its
              parent; of CIFAR-100 the fine labels;
            - `npz:FILE`: arrays `train_inputs`, `train_labels`, `test_inputs`, `test_labels`, or
              `x_train`, `y_train`, `x_test`, `y_test`; or `inputs`, `labels`, or `x`, `y`, of which
              a fifth of each class is kept for the test. Inputs have the shape (N, F), (N, H, W),
              (N, C, H, W), or (N, H, W, C) if C is 1, 3 or 4 and H is not. Features get the shape
              (F, 1, 1). `uint8` is divided by 255; floats are kept as they are. Labels are integers
              from 0, or text;
            - `csv:FILE`: numbers in columns, and a column of labels;
            - `images:DIR`: a folder of images for each class, or two such sets, `train` and `test`;
            - what `extra` adds.
        extra: Further forms.

    Returns:
        The data, checked.

    Raises:
        DataError: For whatever is wrong with `spec` or with the files.

    Example:
        >>> load("digits")
        DataSet(digits: 1437 training and 360 test examples of shape (1, 8, 8), 10 classes)
    """
    forms = (*FORMS, *extra)
    kind, _, place = spec.partition(":")
    named = [form for form in forms if form.kind == kind]
    if not named:
        spellings = {form.kind: form.spelling for form in forms}
        near = difflib.get_close_matches(kind.lower(), spellings, n=1)
        way_out = f"did you mean {spellings[near[0]]}?" if near else "name one of these"
        raise wrong(spec, "unknown data", ", ".join(spellings.values()), way_out)
    if len(named) > 1:
        raise wrong(kind, f"{len(named)} forms of data of this name", "one", "rename the others")
    return _read(named[0], spec, place)


def _read(form: DataForm, spec: str, place: str) -> DataSet:
    if bool(place) != bool(form.place):
        got, spelling = "a path" if place else "no path", form.spelling
        raise wrong(spec, got, f"the form {spelling}", f"give {spelling}")
    path, where = Path(place), place or form.kind
    with reading(where):
        path = path.expanduser()
        if form.place and not path.exists():
            raise wrong(path, "no such path", form.spelling, "check the spelling")
        if form.place == "DIR" and not path.is_dir():
            way_out = "name the folder of the files"
            raise wrong(path, "a file", f"a directory, {form.spelling}", way_out)
        if form.place == "FILE" and not path.is_file():
            way_out = "name the file itself"
            raise wrong(path, "no regular file", f"a file, {form.spelling}", way_out)
        title = path.resolve().name if form.place == "DIR" else path.stem
        name = title if form.titled and title else form.kind  # that of / and of nothing is empty
        return joined(name, path if place else form.kind, form.read(path))
