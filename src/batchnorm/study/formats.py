"""Files of arrays, IDX and npz, read without trusting them.

No file can run code, and no header is believed before the size of its file agrees.
"""

from __future__ import annotations

import gzip
import io
import math
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
