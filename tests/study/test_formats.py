"""IDX and npz give their values back; damaged, they fill no memory and end in no trace."""

import gzip
import io
import struct
import zipfile
from functools import partial

import numpy as np
import pytest
from study.loading import (
    assert_refused,
    assert_sound,
    assert_survives_damage,
    assert_values,
    write_npz,
)

from batchnorm.study.data import load

IDX_NAMES = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
IDX_CODES = {"|u1": 0x08, "|i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 4, 5), np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 3
X = np.ones((6, 2), np.float32)
Y = np.arange(6) % 3


def idx(array):
    header = (0, 0, IDX_CODES[array.dtype.str], array.ndim, *array.shape)
    return struct.pack(f">BBBB{array.ndim}I", *header) + array.tobytes()


def write_mnist(folder, images=IMAGES, labels=LABELS, joint="-", ending=""):
    pack = gzip.compress if ending else bytes
    for name, array in zip(IDX_NAMES, (images, labels, IMAGES[:6], LABELS[:6]), strict=True):
        file = folder / f"{name.replace('-idx', joint + 'idx')}-ubyte{ending}"
        file.write_bytes(pack(idx(array)))
    return f"mnist:{folder}"


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(x):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", npy(Y))
    return stream.getvalue()


# Of each kind: what writes a whole data set into a folder, and one of its files, to damage.
KINDS = {
    "idx": (write_mnist, "train-images-idx3-ubyte"),
    "gzip": (partial(write_mnist, ending=".gz"), "train-images-idx3-ubyte.gz"),
    "npz": (partial(write_npz, x=X, y=Y), "a.npz"),
    "packed npz": (partial(write_npz, save=np.savez_compressed, inputs=X, labels=Y), "a.npz"),
}


def write_with(content, kind, folder):
    write, name = KINDS[kind]
    spec = write(folder)
    (folder / name).write_bytes(content)
    return spec, folder / name


@pytest.mark.parametrize(("images", "labels"), [("|u1", ">i4"), (">f4", "|i1"), (">f8", ">i2")])
@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist(tmp_path, images, labels, joint, ending):
    images, labels = (IMAGES / 7).astype(images), LABELS.astype(labels)
    data = load(write_mnist(tmp_path, images, labels, joint, ending))
    assert_values(data, "mnist", (1, 4, 5), images, labels, IMAGES[:6], LABELS[:6])


def test_fashion_mnist(tmp_path):
    write_mnist(tmp_path)
    data = load(f"fashion-mnist:{tmp_path}")
    assert_values(data, "fashion-mnist", (1, 4, 5), IMAGES, LABELS, IMAGES[:6], LABELS[:6])


def test_npz(tmp_path):
    arrays = (IMAGES, LABELS, IMAGES[:6], LABELS[:6])
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    named = dict(zip(names, arrays, strict=True))
    data = load(write_npz(tmp_path, np.savez_compressed, other=X, **named))
    assert_values(data, "a", (1, 4, 5), *arrays)


def test_text_labels_are_numbered_in_sorted_order(tmp_path):
    names = np.array(["cat", "ant", "bee"])[Y]
    arrays = {"x_train": X, "y_train": names[:, None], "x_test": X[:2], "y_test": names[:2]}
    _, train_y, _, test_y = assert_sound(load(write_npz(tmp_path, **arrays)))
    assert train_y.tolist() == [2, 0, 1, 2, 0, 1]
    assert test_y.tolist() == [2, 0]


PLAIN = idx(IMAGES)
WRONG_IDX = [
    (b"", "magic number ''"),
    (b"\x01\0" + PLAIN[2:], "magic number '01 00 08 03'"),
    (b"\0\0\x0a" + PLAIN[3:], "magic number '00 00 0a 03'"),
    (PLAIN[:9], "12 bytes"),
    (PLAIN[:-1], "fewer bytes, expected 240 for the shape (12, 4, 5)"),
    (PLAIN + b"\0", "more bytes, expected 240"),
    (struct.pack(">I3I", 0x0803, *[2**32 - 1] * 3), "fewer bytes"),
    (b"\0\0\x08\xff" + bytes(4 * 255), "error"),
    (b"\0\0\x08\x00\x07", "inputs of shape ()"),
    (idx(IMAGES.astype("|i1")), "inputs of type int8"),
]
GZIP = gzip.compress(PLAIN)
NPY = npy(X)
NPZ = npz(NPY)
WRONG = [
    *(("idx", content, words) for content, words in WRONG_IDX),
    *(("gzip", gzip.compress(content), words) for content, words in WRONG_IDX),
    ("gzip", PLAIN, "gzip"),
    ("gzip", GZIP[:-20], "ended before"),
    ("gzip", GZIP + b"garbage", "gzip"),
    ("gzip", GZIP[:-8] + bytes(4) + GZIP[-4:], "CRC"),
    ("gzip", GZIP[:10] + b"\xff" * 40 + GZIP[50:], "error"),
    ("npz", npz(b""), "magic"),
    ("npz", npz(NPY[:30]), "EOF"),
    ("npz", npz(NPY[:-1]), "47 bytes, expected 48 for the shape (6, 2)"),
    ("npz", npz(NPY + b"\0"), "49 bytes, expected 48"),
    ("npz", npz(NPY.replace(b"(6, 2), }", b"(6, -2),}")), "48 bytes, expected -48"),
    ("npz", npz(NPY.replace(b"(6, 2), }", b"(-6,-2),}")), "error"),
    ("npz", npz(NPY.replace(b"6, 2), }" + b" " * 14, b"99999999, 99999999), }")), "48 bytes, exp"),
    ("npz", npz(NPY.replace(b"<f4", b"|V0")), "48 bytes, expected 0"),
    ("npz", npz(NPY.replace(b"<f4", b"<q9")), "error"),
    ("npz", NPY, "zip"),
    ("npz", NPZ.replace(X.tobytes(), bytes(48)), "CRC"),
]


@pytest.mark.parametrize(("kind", "content", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_file(tmp_path, kind, content, words):
    spec, file = write_with(content, kind, tmp_path)
    assert_refused(spec, file, words)


def test_missing_files(tmp_path):
    mnist = write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert_refused(mnist, tmp_path, "no t10k-labels-idx1-ubyte", ", t10k-labels.idx1-ubyte.gz; ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_loads_or_raises_data_error(tmp_path, kind):
    write, name = KINDS[kind]
    assert_survives_damage(write(tmp_path), tmp_path / name)
