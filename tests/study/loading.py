"""What the tests of loading share: a writer of .npz files, and what holds of whatever loads."""

import contextlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.study.data import DataError, load


def write_npz(folder, save=np.savez, **arrays):
    save(folder / "a.npz", **arrays)
    return f"npz:{folder / 'a.npz'}"


def assert_refused(spec, *words, extra=()):
    with pytest.raises(DataError) as caught:
        load(spec, extra)
    message = str(caught.value)
    assert message.isprintable(), message  # so it is one line
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # as out of a worker process
    for word in words:
        assert str(word) in message


def assert_sound(data):
    """Assert what `DataSet` promises; return inputs and labels, of training and of test."""
    parts = data.train_inputs, data.train_labels, data.test_inputs, data.test_labels
    for inputs, labels in (parts[:2], parts[2:]):
        assert (inputs.dtype, labels.dtype) == (np.float32, np.int64)
        assert inputs.shape == (len(labels), *data.shape)
        assert inputs.flags.c_contiguous
        assert inputs.flags.writeable
        assert labels.flags.writeable
        assert 0 <= labels.min() <= labels.max() < data.classes
        assert np.isfinite(inputs).all()
    return parts


def assert_values(data, name, shape, *arrays):
    assert (data.name, data.shape) == (name, shape)
    for part, array in zip(assert_sound(data), arrays, strict=True):
        if part.ndim == 4:
            array = array.astype(np.float32) / np.float32(255 if array.dtype == np.uint8 else 1)
        np.testing.assert_array_equal(part.ravel(), np.ravel(array))


def assert_survives_damage(spec, file, examples=60):
    """Assert that whatever becomes of a file either loads or is refused in one line."""
    assert_sound(load(spec))

    @settings(deadline=None, max_examples=examples)
    @given(_damaged(file.read_bytes()))
    def check(raw):
        file.write_bytes(raw)
        with contextlib.suppress(DataError):
            assert_sound(load(spec))

    check()


def _damaged(raw):
    """Cut the file, or change some of its bytes; those of the header are the likely ones."""
    place = st.integers(0, min(200, len(raw) - 1)) | st.integers(0, len(raw) - 1)
    changes = st.dictionaries(place, st.integers(0, 255), min_size=1, max_size=4)
    changed = changes.map(lambda new: bytes(new.get(i, old) for i, old in enumerate(raw)))
    return place.map(lambda end: raw[:end]) | changed
