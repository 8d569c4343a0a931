"""The files that data comes in, read without trusting them.

No file can run code, and no header is believed before the size of its file agrees.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from batchnorm.study.errors import reading, wrong

Array: TypeAlias = NDArray[Any]
Part: TypeAlias = tuple[object, Array]  # an array, after the place that an error names

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DEFLATE_LIMIT = 1032  # no byte of a gzip file unpacks to more bytes than this
_PICKLED_NAMES = (
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
)
_NPZ_KEYS = (
    ("train_inputs", "train_labels", "test_inputs", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("inputs", "labels"),
    ("x", "y"),
)


def read_mnist(folder: Path) -> list[Part]:
    """Read four IDX files: inputs and labels, of training and of test."""
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return [_idx(_find_idx(folder, f"{name}-ubyte")) for name in names]


def _find_idx(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")
    names = [name, f"{name}.gz", dotted, f"{dotted}.gz"]
    for file in (folder / spelling for spelling in names):
        if file.is_file():
            return file
    way_out = "name the folder that holds all four files"
    raise wrong(folder, f"no {name}", f"one of {', '.join(names)}", way_out)


def _idx(path: Path) -> Part:
    """Read an IDX file: two zero bytes, the type, the rank, the dimensions, the values."""
    with reading(path):
        packed = path.suffix == ".gz"
        room = path.stat().st_size * (_DEFLATE_LIMIT if packed else 1)
        with gzip.open(path) if packed else path.open("rb") as stream:
            magic = stream.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES:
                raise wrong(path, f"the magic number '{magic.hex(' ')}'", "'00 00 08 ..' of IDX")
            dtype = np.dtype(_IDX_TYPES[magic[2]])
            shape = struct.unpack(f">{magic[3]}I", stream.read(4 * magic[3]))
            size = math.prod(shape) * dtype.itemsize
            values = stream.read(size + 1) if size <= room else b""
        if len(values) != size:
            got = "more bytes" if len(values) > size else "fewer bytes"
            raise wrong(path, got, f"{size} for the shape {shape} in the header")
        return path, np.frombuffer(values, dtype).reshape(shape)


def read_cifar10(folder: Path) -> list[Part]:
    """Read the six files of one version: inputs and labels, of training and of test."""
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    layouts = [
        [folder / inner / f"{name}{ending}" for name in names]
        for ending, usual in ((".bin", "cifar-10-batches-bin"), ("", "cifar-10-batches-py"))
        for inner in (".", usual)
    ]
    files = max(layouts, key=lambda layout: sum(file.is_file() for file in layout))
    missing = ", ".join(file.name for file in files if not file.is_file())
    if missing:
        expected = "these there, or all in cifar-10-batches-bin (.bin) or cifar-10-batches-py"
        raise wrong(files[0].parent, f"no {missing}", expected, "name the folder of all six files")
    batches = [_cifar10_batch(file) for file in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches[:-1], strict=True))
    return [(folder, array) for array in (pixels, labels, *batches[-1])]


def _cifar10_batch(path: Path) -> tuple[Array, Array]:
    """Read the pixels (N, 3, 32, 32) and the labels (N,) of one file, of either version."""
    with reading(path):
        raw = path.read_bytes()
        if path.suffix != ".bin":
            pixels, labels = _unpickle(path, raw)
        elif len(raw) % 3073:
            raise wrong(path, f"{len(raw)} bytes", "rows of 3073 bytes")
        else:
            rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
            pixels, labels = rows[:, 1:], rows[:, 0]
        if len(labels) == 0 or pixels.shape != (len(labels), 3072):
            got = f"{len(labels)} labels and inputs of shape {pixels.shape}"
            raise wrong(path, got, "one or more labels and 3072 values for each")
        if labels.min() < 0 or labels.max() > 9:
            raise wrong(path, f"labels from {labels.min()} to {labels.max()}", "labels 0 to 9")
        return pixels.reshape(-1, 3, 32, 32), labels


def _unpickle(path: Path, raw: bytes) -> tuple[Array, Array]:
    # This pass runs nothing. It fails where a length reaches beyond the end of the file, and finds
    # a memo index for which the unpickler would make a table larger than the file can need.
    for code, value, _ in pickletools.genops(raw):
        if code.name in ("PUT", "LONG_BINPUT") and isinstance(value, int) and value > len(raw):
            raise wrong(path, f"a pickle with a memo of {value} entries", "CIFAR-10's")
    content = _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    if not isinstance(content, dict):
        raise wrong(path, f"a pickled {type(content).__name__}", "CIFAR-10's dictionary")
    # Python 2, which wrote the original files, has bytes where Python 3 has text.
    data, labels = (content.get(key.encode(), content.get(key)) for key in ("data", "labels"))
    if not isinstance(data, _Pickled) or not isinstance(labels, list):
        raise wrong(path, "other entries", "an array 'data' and a list 'labels'")
    if any(type(label) is not int for label in labels):
        raise wrong(path, "labels that are not integers", "labels 0 to 9")
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


def read_npz(path: Path) -> list[Part]:
    """Read inputs and labels, of training and of test, or of both together."""
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        keys = next((keys for keys in _NPZ_KEYS if names.issuperset(keys)), None)
        if keys is None:
            got = f"the arrays {', '.join(sorted(names)[:8]) or '(none)'}"
            expected = " or ".join(", ".join(keys) for keys in _NPZ_KEYS)
            raise wrong(path, got, expected, "save it with numpy.savez and these names")
        return [_npy(f"{path}, {key}", archive.read(f"{key}.npy")) for key in keys]


def _npy(where: str, raw: bytes) -> Part:
    """Read what `numpy.load` reads, but believe the header only where the size agrees."""
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise wrong(where, "pickled objects", "numbers", "save it with a numeric dtype")
    start = stream.tell()
    size = math.prod(shape) * dtype.itemsize
    if len(raw) - start != size:
        got = f"{len(raw) - start} bytes"
        raise wrong(where, got, f"{size} for the shape {shape} in the header")
    values = np.frombuffer(raw, dtype, offset=start)
    return where, values.reshape(shape, order="F" if fortran else "C")
