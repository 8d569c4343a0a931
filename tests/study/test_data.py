"""What loads is sound, and every mistake gives one line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from study.loading import assert_refused, assert_sound, write_npz

from batchnorm.study.data import FORMS, DataForm, load

X = np.ones((6, 2), np.float32)
Y = np.arange(6) % 3
OTHERS = (int, bool, complex, "M8[s]", "U3", "V3", "u1,f4")  # types that inputs cannot have
APART = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y}


def test_digits():
    from sklearn.datasets import load_digits

    data = load("digits")
    train_x, train_y, test_x, test_y = assert_sound(data)
    assert (data.name, data.classes, data.shape) == ("digits", 10, (1, 8, 8))
    np.testing.assert_array_equal(load("digits").test_inputs, test_x)
    pixels, labels = load_digits(return_X_y=True)
    ours = np.concatenate([train_x, test_x]).reshape(-1, 64) * 16
    ours = np.column_stack([ours, np.concatenate([train_y, test_y])])
    theirs = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_refused("digits", 'pip install "batchnorm[study]"')


def test_one_part_is_split_by_class(tmp_path):
    labels = np.repeat([0, 1, 3], [50, 20, 10])
    data = load(write_npz(tmp_path, x=np.arange(80.0)[:, None], y=labels))
    train_x, train_y, test_x, test_y = assert_sound(data)
    assert data.classes == 4
    assert np.bincount(test_y).tolist() == [10, 4, 0, 2]
    places = np.concatenate([train_x, test_x]).ravel().astype(int)
    assert sorted(places) == list(range(80))
    np.testing.assert_array_equal(np.concatenate([train_y, test_y]), labels[places])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 7), (7, 1, 1)),
        ((6, 5, 7), (1, 5, 7)),
        ((6, 8, 7, 1), (1, 8, 7)),
        ((6, 8, 7, 3), (3, 8, 7)),
        ((6, 8, 7, 4), (4, 8, 7)),
        ((6, 3, 8, 7), (3, 8, 7)),
        ((6, 3, 8, 3), (3, 8, 3)),
        ((6, 2, 8, 7), (2, 8, 7)),
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "f2", ">f4", "f8"])
def test_shapes_and_types(tmp_path, shape, expected, dtype):
    x = np.asfortranarray(np.random.default_rng(0).integers(0, 200, shape).astype(dtype))
    y = np.arange(6, dtype=np.int8)[:, None] % 2
    data = load(write_npz(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y))
    assert_sound(data)
    assert data.shape == expected
    values = x if shape[1:] == expected or len(shape) < 4 else x.transpose(0, 3, 1, 2)
    values = values.reshape(6, *expected).astype(np.float32)
    scale = np.float32(255 if dtype == "u1" else 1)
    np.testing.assert_array_equal(data.train_inputs, values / scale)
    np.testing.assert_array_equal(data.test_labels, y[:, 0])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("imagenet", ["imagenet", "unknown", "digits, mnist:DIR, fashion-mnist:DIR, cifar10:"]),
        ("MNIST:here", ["did you mean mnist:DIR?"]),
        ("cifar:here", ["did you mean cifar10:DIR?"]),
        ("fashion_mnist:here", ["did you mean fashion-mnist:DIR?"]),
        ("digits:here", ["a path", "digits"]),
        ("npz:", ["no path", "npz:FILE"]),
        ("mnist:{tmp}/none", ["{tmp}/none", "no such path"]),
        ("cifar10:{tmp}/file", ["{tmp}/file", "directory"]),
        ("npz:{tmp}", ["{tmp}", "regular file"]),
        ("npz:~no-such-user/a.npz", ["home directory"]),
        ("npz:{tmp}/" + "long" * 1000, ["error"]),
        ("npz:{tmp}/two\nlines", ["two lines", "no such path"]),
        ("npz:{tmp}/nul\0byte", [r"nul\x00byte"]),
        ("npz:{tmp}/\x1b[31mred", [r"\x1b[31mred", "no such path"]),
        ("npz:{tmp}/\udcff", [r"\udcff", "no such path"]),
    ],
)
def test_wrong_name(tmp_path, spec, words):
    (tmp_path / "file").touch()
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert_refused(spec.replace("{tmp}", str(tmp_path)), *words)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "(none), expected train_inputs, train_labels, test_inputs, test_labels or x_train"),
        ({"x_train": X, "y": Y, "x_test": X}, "the arrays x_test, x_train, y, expected"),
        ({"x": X[:5], "y": Y}, ", y: got 6 labels, expected 5, the inputs of {file}, x"),
        ({"x": X[:0], "y": Y[:0]}, ", x: got empty inputs, of shape (0, 2)"),
        ({"x": X[:, 0], "y": Y}, ", x: got inputs of shape (6,)"),
        ({"x": X[:, :, None, None, None], "y": Y}, ", x: got inputs of shape (6, 2, 1, 1, 1)"),
        *(({"x": X.astype(t), "y": Y}, f"inputs of type {np.dtype(t).name}") for t in OTHERS),
        *(({"x": np.full((6, 2), x), "y": Y}, "NaN, infinite or") for x in (np.nan, np.inf, 1e300)),
        ({"x": X, "y": Y.astype(float)}, ", y: got labels of type float64"),
        ({"x": X, "y": Y.astype(bool)}, ", y: got labels of type bool"),
        ({"x": X, "y": np.eye(6, dtype=int)}, ", y: got labels of shape (6, 6)"),
        ({"x": X, "y": Y[0]}, ", y: got labels of shape ()"),
        ({"x": X, "y": Y - 1}, ", y: got the negative label -1"),
        ({"x": X, "y": Y.astype(np.uint64) + np.uint64(2**63)}, ", y: got the negative label"),
        ({"x": X, "y": Y * 0}, "one class only, 0"),
        ({"x": X, "y": Y * 10**9}, "the label 2000000000 among"),
        ({"x": X, "y": [0, 0, 0, 1, 1, 2]}, "one example with the label 2"),
        ({"x": X, "y": list("aaabbc")}, "one example with the label c"),
        ({"x": X, "y": list("aaaaaa")}, "one class only, a, to train on"),
        (APART | {"y_test": list("abcabc")}, "both text and numbers as labels"),
        (APART | {"y_test": Y + 1}, "the test label 3, which"),
        (APART | {"y_train": list("abcabc"), "y_test": list("abcxbc")}, "the test label x, which"),
        (APART | {"x_test": X[:, :1]}, "test inputs of shape (1, 1, 1), expected (2, 1, 1)"),
        (APART | {"x_test": X[:0], "y_test": Y[:0]}, ", x_test: got empty"),
        (APART | {"y_test": Y[:5]}, ", y_test: got 5 labels"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, words):
    file = str(tmp_path / "a.npz")
    assert_refused(write_npz(tmp_path, **arrays), file, words.replace("{file}", file))


def parts_of(path):
    return [(path, np.arange(20.0)[:, None]), (path, np.arange(20) % 2)]


def test_forms_are_read_where_they_are_and_called_as_they_say(tmp_path):
    places = []

    def read(path):
        places.append(path)
        return parts_of(path)

    (tmp_path / "set.a").mkdir()
    (tmp_path / "set.a" / "file.b").touch()
    for place, suffix, usual, titled in (
        ("", "", "mine", "mine"),
        ("DIR", f":{tmp_path}/set.a", "mine", "set.a"),
        ("FILE", f":{tmp_path}/set.a/file.b", "mine", "file"),
    ):
        for own, name in ((False, usual), (True, titled)):
            data = load(f"mine{suffix}", [DataForm("mine", place, read, own)])
            assert_sound(data)
            assert data.name == name
            assert str(places[-1]) == (suffix[1:] or ".")


def test_a_folder_without_a_name_has_that_of_its_form(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    form = DataForm("mine", "DIR", parts_of, titled=True)
    assert load("mine:.", [form]).name == "here"
    assert load("mine:/", [form]).name == "mine"


def test_further_forms_are_known_to_errors():
    stripes = DataForm("stripes", "DIR", parts_of)
    assert_refused("stripe:x", "npz:FILE", "did you mean stripes:DIR?", extra=[stripes])
    assert_refused("stripes", "no path", "the form stripes:DIR", extra=[stripes])
    spellings = ", ".join(form.spelling for form in (*FORMS, stripes))
    assert_refused("what", spellings, extra=[stripes])
    assert_refused("stripes:.", "2 forms of data of this name", extra=[stripes, stripes])
    assert_refused("digits", "2 forms", extra=[DataForm("digits", "", parts_of)])


def test_what_a_further_form_does_wrong_is_said_in_one_line():
    def of(read):
        return [DataForm("mine", "", read)]

    assert_refused("mine", "mine: got 1 arrays", extra=of(lambda path: parts_of(path)[:1]))
    assert_refused("mine", "mine: got the error 'None'", extra=of(lambda path: {}[None]))
    assert_refused("mine", "6 labels", extra=of(lambda path: [*parts_of("it")[:1], ("it", Y)]))


def test_the_table_of_the_documentation_has_every_form():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert rows == ["--data", *(form.spelling for form in FORMS)]
