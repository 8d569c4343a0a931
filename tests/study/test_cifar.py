"""Both CIFARs, in both versions, give their values back; no pickle runs or fills the memory."""

import os
import pickle
import pickletools
import struct
import tracemalloc
from functools import partial

import numpy as np
import pytest
from study.loading import assert_refused, assert_survives_damage, assert_values, write_npz

from batchnorm.study.data import load

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
FILES = {"cifar10": [*BATCHES, "test_batch"], "cifar100": ["train", "test"]}
ROWS = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)


def batches(kind):
    """Yield the name, the pixels and the labels of each file."""
    for number, name in enumerate(FILES[kind]):
        yield name, ROWS + np.uint8(number % 5), [number % 5, 0, 1, 2]


def write_binary(folder, kind="cifar10"):
    for name, rows, labels in batches(kind):
        coarse = [[7] * 4] * (kind == "cifar100")
        columns = np.array([*coarse, labels], np.uint8).T
        (folder / f"{name}.bin").write_bytes(np.hstack([columns, rows]).tobytes())
    return f"{kind}:{folder}"


def write_pickles(folder, kind="cifar10", dump=pickle.dumps, protocol=4, order="C"):
    for name, rows, labels in batches(kind):
        content = {"batch_label": name, "data": np.array(rows, order=order)}
        if kind == "cifar10":
            content["labels"] = labels
        else:
            content |= {"coarse_labels": [7] * 4, "fine_labels": labels}
        (folder / name).write_bytes(dump(content, protocol))
    return f"{kind}:{folder}"


def python2_dumps(content, _):
    """Write what Python 2 did, to which text and bytes are one type: U and T, not C, B and X."""
    raw = pickle.dumps(content, 3).replace(b"numpy._core", b"numpy.core")
    changed = bytearray(raw)
    for code, _, place in pickletools.genops(raw):
        changed[place] = ord({"C": "U", "B": "T", "X": "T"}.get(code.code, code.code))
    return b"\x80\x02" + changed[2:]


@pytest.mark.parametrize(
    ("write", "inner"),
    [
        (write_binary, "."),
        (write_binary, "cifar-10-batches-bin"),
        (partial(write_pickles, dump=python2_dumps), "."),
        (partial(write_pickles, order="F"), "."),
        *((partial(write_pickles, protocol=p), "cifar-10-batches-py") for p in range(5)),
        (partial(write_binary, kind="cifar100"), "."),
        (partial(write_binary, kind="cifar100"), "cifar-100-binary"),
        (partial(write_pickles, kind="cifar100", dump=python2_dumps), "."),
        (partial(write_pickles, kind="cifar100"), "cifar-100-python"),
    ],
)
def test_values(tmp_path, write, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    kind, _, _ = write(tmp_path / inner).partition(":")
    _, rows, labels = zip(*batches(kind), strict=True)
    train = np.concatenate(rows[:-1]), np.concatenate(labels[:-1])
    data = load(f"{kind}:{tmp_path}")
    assert_values(data, kind, (3, 32, 32), *train, rows[-1], labels[-1])


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
WRONG = [
    (write_binary, b"", "0 labels"),
    (write_binary, bytes(3072), "3072 bytes, expected rows of 3073"),
    (write_binary, b"\x0a" + bytes(3072), "labels from 10 to 10, expected labels 0 to 9"),
    *((write_pickles, pickle.dumps(content, 2), words) for content, words in WRONG_PICKLES),
    *((write_pickles, pickle.dumps(content, 4), words) for content, words in WRONG_PICKLES),
    (write_pickles, b"cbuiltins\neval\n.", "builtins.eval is refused"),
    (write_pickles, b"cnumpy\nload\n.", "numpy.load is refused"),
    (write_pickles, b"c_codecs\ndecode\n.", "_codecs.decode is refused"),
]
WRONG_100 = [
    (write_binary, bytes(3073), "3073 bytes, expected rows of 3074"),
    (write_binary, b"\0\x64" + bytes(3072), "labels from 100 to 100, expected labels 0 to 99"),
    (write_pickles, pickle.dumps({"data": ROWS, "labels": [0, 1, 2, 3]}), "'fine_labels'"),
    (write_pickles, b"cbuiltins\neval\n.", "builtins.eval is refused"),
]


def write_with(content, write, folder, kind="cifar10"):
    """Write all files, and replace one of training."""
    spec = write(folder, kind)
    file = folder / f"{FILES[kind][0]}{'.bin' if write is write_binary else ''}"
    file.write_bytes(content)
    return spec, file


@pytest.mark.parametrize(
    ("kind", "write", "content", "words"),
    [*(("cifar10", *row) for row in WRONG), *(("cifar100", *row) for row in WRONG_100)],
    ids=range(len(WRONG) + len(WRONG_100)),
)
def test_wrong_file(tmp_path, kind, write, content, words):
    spec, file = write_with(content, write, tmp_path, kind)
    assert_refused(spec, file, words)


@pytest.mark.parametrize(
    ("kind", "binary", "python"),
    [
        ("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-binary", "cifar-100-python"),
    ],
)
def test_missing_files(tmp_path, kind, binary, python):
    assert_refused(f"{kind}:{tmp_path}", tmp_path, *FILES[kind], binary, python)
    folder = tmp_path / python
    folder.mkdir()
    write_pickles(folder, kind)
    (folder / FILES[kind][-1]).unlink()
    assert_refused(f"{kind}:{tmp_path}", f"{folder}: got no {FILES[kind][-1]}, ")


class Payload(str):
    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_not_run(tmp_path, protocol):
    witness = tmp_path / "witness"
    attack = pickle.dumps({"labels": [0, 1, 2, Payload(witness)], "data": ROWS}, protocol)
    spec, file = write_with(attack, write_pickles, tmp_path)
    assert_refused(spec, file, "mkdir is refused")
    spec = write_npz(tmp_path, x=np.array([Payload(witness)], object), y=[0])
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
    spec, file = write_with(bomb, write_pickles, tmp_path)
    tracemalloc.start()
    try:
        assert_refused(spec, file)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_binary, "data_batch_3.bin"),
        (write_pickles, "data_batch_3"),
        (partial(write_pickles, dump=python2_dumps), "test_batch"),
        (partial(write_pickles, kind="cifar100"), "train"),
    ],
)
def test_a_damaged_file_loads_or_raises_data_error(tmp_path, write, name):
    assert_survives_damage(write(tmp_path), tmp_path / name)
