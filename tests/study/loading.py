"""What the tests of loading share: a writer of .npz files, and what holds of whatever loads."""

import pickle

import numpy as np
import pytest

from batchnorm.study.data import DataError, load


def write_npz(folder, save=np.savez, **arrays):
    save(folder / "a.npz", **arrays)
    return f"npz:{folder / 'a.npz'}"


def assert_refused(spec, *words):
    with pytest.raises(DataError) as caught:
        load(spec)
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
