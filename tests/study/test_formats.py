"""Every format gives its values back; no file runs code, fills the memory or ends in a trace."""

import contextlib
import gzip
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study.loading import assert_refused, assert_sound, write_npz

from batchnorm.study.data import DataError, load

IDX_NAMES = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
IDX_CODES = {"|u1": 0x08, "|i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
CIFAR_NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 4, 5), np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 3
ROWS = RNG.integers(0, 256, (4, 3072), np.uint8)
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


def cifar_batches():
    for number, name in enumerate(CIFAR_NAMES):
        yield name, ROWS + np.uint8(number % 5), [number % 5, 0, 1, 2]


def write_binary(folder):
    for name, rows, labels in cifar_batches():
        content = np.column_stack([np.array(labels, np.uint8), rows]).tobytes()
        (folder / f"{name}.bin").write_bytes(content)
    return f"cifar10:{folder}"


def write_pickles(folder, dump=pickle.dumps, protocol=4, order="C"):
    for name, rows, labels in cifar_batches():
        content = {"batch_label": name, "labels": labels, "data": np.array(rows, order=order)}
        (folder / name).write_bytes(dump(content, protocol))
    return f"cifar10:{folder}"


def python2_dumps(content, _):
    """Write what Python 2 did, to which text and bytes are one type: U and T, not C, B and X."""
    raw = pickle.dumps(content, 3).replace(b"numpy._core", b"numpy.core")
    changed = bytearray(raw)
    for code, _, place in pickletools.genops(raw):
        changed[place] = ord({"C": "U", "B": "T", "X": "T"}.get(code.code, code.code))
    return b"\x80\x02" + changed[2:]


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
    "binary": (write_binary, "data_batch_3.bin"),
    "pickle": (write_pickles, "data_batch_3"),
    "pickle of Python 2": (partial(write_pickles, dump=python2_dumps), "test_batch"),
    "npz": (partial(write_npz, x=X, y=Y), "a.npz"),
    "packed npz": (partial(write_npz, save=np.savez_compressed, inputs=X, labels=Y), "a.npz"),
}


def write_with(content, kind, folder):
    write, name = KINDS[kind]
    spec = write(folder)
    (folder / name).write_bytes(content)
    return spec, folder / name


def assert_values(data, name, shape, *arrays):
    assert (data.name, data.shape) == (name, shape)
    for part, array in zip(assert_sound(data), arrays, strict=True):
        if part.ndim == 4:
            array = array.astype(np.float32) / np.float32(255 if array.dtype == np.uint8 else 1)
        np.testing.assert_array_equal(part.ravel(), np.ravel(array))


@pytest.mark.parametrize(("images", "labels"), [("|u1", ">i4"), (">f4", "|i1"), (">f8", ">i2")])
@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist(tmp_path, images, labels, joint, ending):
    images, labels = (IMAGES / 7).astype(images), LABELS.astype(labels)
    data = load(write_mnist(tmp_path, images, labels, joint, ending))
    assert_values(data, "mnist", (1, 4, 5), images, labels, IMAGES[:6], LABELS[:6])


@pytest.mark.parametrize(
    ("write", "inner"),
    [
        (write_binary, "."),
        (write_binary, "cifar-10-batches-bin"),
        (partial(write_pickles, dump=python2_dumps), "."),
        (partial(write_pickles, order="F"), "."),
        *((partial(write_pickles, protocol=p), "cifar-10-batches-py") for p in range(5)),
    ],
)
def test_cifar10(tmp_path, write, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    write(tmp_path / inner)
    _, rows, labels = zip(*cifar_batches(), strict=True)
    train = np.concatenate(rows[:-1]), np.concatenate(labels[:-1])
    data = load(f"cifar10:{tmp_path}")
    assert_values(data, "cifar10", (3, 32, 32), *train, rows[-1], labels[-1])


def test_npz(tmp_path):
    arrays = (IMAGES, LABELS, IMAGES[:6], LABELS[:6])
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    named = dict(zip(names, arrays, strict=True))
    data = load(write_npz(tmp_path, np.savez_compressed, other=X, **named))
    assert_values(data, "a", (1, 4, 5), *arrays)


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
WRONG_PICKLES = [
    ([1, 2], "a pickled list"),
    ({"data": ROWS}, "'labels'"),
    ({"data": [1], "labels": [1]}, "an array 'data'"),
    ({"data": ROWS, "labels": np.arange(4)}, "a list 'labels'"),
    ({"data": ROWS, "labels": [0, 1, 2]}, "3 labels and inputs of shape (4, 3072)"),
    ({"data": ROWS[:, :3071], "labels": [0, 1, 2, 3]}, "inputs of shape (4, 3071)"),
    ({"data": ROWS, "labels": []}, "0 labels"),
    ({"data": ROWS, "labels": [0, 1, 2, 10]}, "labels from 0 to 10"),
    ({"data": ROWS, "labels": [0, 1, 2, -1]}, "labels from -1 to 2"),
    ({"data": ROWS, "labels": [0, 1, 2, 2**80]}, "error"),
    ({"data": ROWS, "labels": [0, 1, 2, True]}, "not integers"),
    ({"data": ROWS.astype(np.float32), "labels": [0, 1, 2, 3]}, "'f4'"),
    ({"data": np.array([[None]]), "labels": [0]}, "'O8'"),
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
    ("binary", b"", "0 labels"),
    ("binary", bytes(3072), "3072 bytes, expected rows of 3073"),
    ("binary", b"\x0a" + bytes(3072), "labels from 10 to 10, expected labels 0 to 9"),
    *(("pickle", pickle.dumps(content, 2), words) for content, words in WRONG_PICKLES),
    *(("pickle", pickle.dumps(content, 4), words) for content, words in WRONG_PICKLES),
    ("pickle", b"cbuiltins\neval\n.", "builtins.eval is refused"),
    ("pickle", b"cnumpy\nload\n.", "numpy.load is refused"),
    ("pickle", b"c_codecs\ndecode\n.", "_codecs.decode is refused"),
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
    cifar = f"cifar10:{tmp_path}"
    assert_refused(cifar, tmp_path, *CIFAR_NAMES, "cifar-10-batches-bin", "cifar-10-batches-py")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    write_pickles(folder)
    (folder / "data_batch_4").unlink()
    assert_refused(cifar, f"{folder}: got no data_batch_4, ")
    mnist = write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert_refused(mnist, tmp_path, "no t10k-labels-idx1-ubyte", ", t10k-labels.idx1-ubyte.gz; ")


class Payload(str):
    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_not_run(tmp_path, protocol):
    witness = tmp_path / "witness"
    attack = pickle.dumps({"labels": [0, 1, 2, Payload(witness)], "data": ROWS}, protocol)
    spec, file = write_with(attack, "pickle", tmp_path)
    assert_refused(spec, file, "mkdir is refused")
    spec = write_npz(tmp_path, x=np.array([Payload(witness)], object), y=Y)
    assert_refused(spec, "a.npz, x: got pickled objects")
    assert not witness.exists()
    pickle.loads(attack)  # and the attack is one
    assert witness.exists()


@pytest.mark.parametrize(
    "bomb",
    [
        b"K\x01r\0\0\0\1.",  # a memo of 2**24 entries
        b"K\x01p16777216\n.",
        b"\x8e" + struct.pack("<Q", 2**38) + b".",  # bytes that are not there
        b"\x80\x05\x96" + struct.pack("<Q", 2**38) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**38) + b"N.",
        # an array of 2**38 values
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L274877906944L\ntU\x01btR.",
        # one text, encoded a thousand times
        b"(V" + b"a" * 2**16 + b"\nNtp0\n0(" + b"c_codecs\nencode\ng0\nR" * 1000 + b"l.",
        # a name of a type that is written out as 2**22 words
        b"}(Vlabels\n(K\0lVdata\ncnumpy\nndarray\n)R(K\1K\1cnumpy\ndtype\n"
        b"N" + b"p0\n0(g0\ng0\nl" * 22 + b"\x85RK\0Ntbu.",
    ],
)
def test_a_pickle_gets_no_more_memory_than_its_size(tmp_path, bomb):
    spec, file = write_with(bomb, "pickle", tmp_path)
    tracemalloc.start()
    try:
        assert_refused(spec, file)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def damaged(raw):
    """Cut the file, or change some of its bytes; those of the header are the likely ones."""
    place = st.integers(0, min(200, len(raw) - 1)) | st.integers(0, len(raw) - 1)
    changes = st.dictionaries(place, st.integers(0, 255), min_size=1, max_size=4)
    changed = changes.map(lambda new: bytes(new.get(i, old) for i, old in enumerate(raw)))
    return place.map(lambda end: raw[:end]) | changed


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_loads_or_raises_data_error(tmp_path, kind):
    write, name = KINDS[kind]
    spec, file = write(tmp_path), tmp_path / name
    assert_sound(load(spec))

    @settings(deadline=None, max_examples=60)
    @given(damaged(file.read_bytes()))
    def check(raw):
        file.write_bytes(raw)
        with contextlib.suppress(DataError):
            assert_sound(load(spec))

    check()
