"""CIFAR-10 and CIFAR-100, whose Python versions are pickles: read without running them."""

from __future__ import annotations

import io
import pickle
import pickletools
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.study.errors import reading, wrong
from batchnorm.study.formats import Array, Part

_PIXELS = 3 * 32 * 32
_PICKLED_NAMES = (
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
)


@dataclass(frozen=True)
class _Cifar:
    """What differs between the two.

    Attributes:
        files: Those of training, then the one of the test, without `.bin`.
        binary: The folder that the binary version unpacks to.
        python: The folder that the Python version unpacks to.
        key: What the pickled dictionaries call the labels.
        before: How many bytes stand before the pixels in the binary version; the last is the label.
        classes: The number of labels.
    """

    files: tuple[str, ...]
    binary: str
    python: str
    key: str
    before: int
    classes: int


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR10 = _Cifar(
    (*_BATCHES, "test_batch"), "cifar-10-batches-bin", "cifar-10-batches-py", "labels", 1, 10
)
_CIFAR100 = _Cifar(("train", "test"), "cifar-100-binary", "cifar-100-python", "fine_labels", 2, 100)


def read_cifar10(folder: Path) -> list[Part]:
    """Read the six files of one version: inputs and labels, of training and of test."""
    return _read(folder, _CIFAR10)


def read_cifar100(folder: Path) -> list[Part]:
    """Read the two files of one version: inputs and fine labels, of training and of test."""
    return _read(folder, _CIFAR100)


def _read(folder: Path, kind: _Cifar) -> list[Part]:
    layouts = [
        [folder / inner / f"{name}{ending}" for name in kind.files]
        for ending, usual in ((".bin", kind.binary), ("", kind.python))
        for inner in (".", usual)
    ]
    files = max(layouts, key=lambda layout: sum(file.is_file() for file in layout))
    missing = ", ".join(file.name for file in files if not file.is_file())
    if missing:
        expected = f"these there, or all in {kind.binary} (.bin) or {kind.python}"
        way_out = f"name the folder of all {len(files)} files"
        raise wrong(files[0].parent, f"no {missing}", expected, way_out)
    batches = [_batch(file, kind) for file in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches[:-1], strict=True))
    return [(folder, array) for array in (pixels, labels, *batches[-1])]


def _batch(path: Path, kind: _Cifar) -> tuple[Array, Array]:
    """Read the pixels (N, 3, 32, 32) and the labels (N,) of one file, of either version."""
    with reading(path):
        raw, size = path.read_bytes(), kind.before + _PIXELS
        if path.suffix != ".bin":
            pixels, labels = _unpickle(path, raw, kind)
        elif len(raw) % size:
            raise wrong(path, f"{len(raw)} bytes", f"rows of {size} bytes")
        else:
            rows = np.frombuffer(raw, np.uint8).reshape(-1, size)
            pixels, labels = rows[:, kind.before :], rows[:, kind.before - 1]
        if len(labels) == 0 or pixels.shape != (len(labels), _PIXELS):
            got = f"{len(labels)} labels and inputs of shape {pixels.shape}"
            raise wrong(path, got, f"one or more labels and {_PIXELS} values for each")
        if labels.min() < 0 or labels.max() >= kind.classes:
            got = f"labels from {labels.min()} to {labels.max()}"
            raise wrong(path, got, f"labels 0 to {kind.classes - 1}")
        return pixels.reshape(-1, 3, 32, 32), labels


def _unpickle(path: Path, raw: bytes, kind: _Cifar) -> tuple[Array, Array]:
    # This pass runs nothing. It fails where a length reaches beyond the end of the file, and finds
    # a memo index for which the unpickler would make a table larger than the file can need.
    for code, value, _ in pickletools.genops(raw):
        if code.name in ("PUT", "LONG_BINPUT") and isinstance(value, int) and value > len(raw):
            raise wrong(path, f"a pickle with a memo of {value} entries", "CIFAR's")
    content = _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    if not isinstance(content, dict):
        raise wrong(path, f"a pickled {type(content).__name__}", "CIFAR's dictionary")
    # Python 2, which wrote the original files, has bytes where Python 3 has text.
    data, labels = (content.get(key.encode(), content.get(key)) for key in ("data", kind.key))
    if not isinstance(data, _Pickled) or not isinstance(labels, list):
        raise wrong(path, "other entries", f"an array 'data' and a list '{kind.key}'")
    if any(type(label) is not int for label in labels):
        raise wrong(path, "labels that are not integers", f"labels 0 to {kind.classes - 1}")
    _, shape, dtype, fortran, values = data.state
    if dtype.arguments[0] not in ("u1", b"u1"):  # the repr of shared lists can be without end
        raise wrong(path, f"values of type {reprlib.repr(dtype.arguments[0])}", "bytes, 'u1'")
    if isinstance(values, _Pickled):
        values = values.arguments[0].encode("latin-1")
    pixels = np.frombuffer(values, np.uint8).reshape(shape, order="F" if fortran else "C")
    return pixels, np.array(labels, np.int64)


class _Pickled:
    """What a pickle says of an array, of its dtype, or (before protocol 3) of its bytes.

    None of the real functions is called: NumPy's believe the sizes and types they are given, and a
    small file that encodes one text over and over would fill the memory.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    """Lets arrays through, and what needs no name: numbers, text, lists, dictionaries."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_NAMES:
            raise pickle.UnpicklingError(f"the pickled name {module}.{name} is refused")
        return _Pickled
