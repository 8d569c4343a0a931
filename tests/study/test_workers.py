"""What a worker does: a failure is an outcome, and a process that is not fit refuses to work."""

import os
import sys
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
from study.errands import Errand, Note
from study.small import small_data

from batchnorm.environment import describe
from batchnorm.study.tasks import StudyError
from batchnorm.study.workers import attempt, ordered, reason, work

DATA = small_data()


class Odd(Errand):
    """An errand with an outcome that cannot be kept."""

    def perform(self, data_set):
        return {
            "no outcome": None,
            "no number": Note(values=[np.float32(1)]),
            "no JSON": Note(values=[object()]),
        }[self.what]


def sent(task):
    return cloudpickle.dumps(task)


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Errand("small", "fail"), "RuntimeError: as it was told"),  # and no more than a line
        (Errand("small", "exit"), "SystemExit: as it was told"),
        (Errand("small", "nan"), "ValueError: Out of range float values are not JSON compliant"),
        (Odd("small", "no outcome"), "TypeError: asdict() should be called on dataclass instances"),
        (Odd("small", "no number"), "TypeError: Object of type float32 is not JSON serializable"),
        (Odd("small", "no JSON"), "TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_what_goes_wrong_is_the_outcome(task, why):
    outcome = attempt(task, DATA, None)
    assert isinstance(outcome, Note)
    assert outcome.reason.startswith(why)
    assert outcome.reason.isprintable()


def test_ctrl_c_is_no_outcome(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Errand, "perform", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attempt(Errand("small", "a"), DATA, None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError("\n one "), "ValueError: one"),
        (MemoryError(), "MemoryError"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("a\x1b[2J"), r"ValueError: a\x1b[2J"),
    ],
)
def test_a_reason_is_one_line(error, line):
    assert reason(error) == line


def test_the_outcome_comes_with_its_number_and_the_processor():
    order, arrays = ordered(DATA, None)
    number, result = work(7, sent(Errand("small", "a")), order, **arrays)
    outcome, machine = cloudpickle.loads(result)
    assert number == 7
    assert outcome.process == os.getpid()
    assert outcome.values == pytest.approx([DATA.train_inputs.sum(), DATA.test_labels.sum()])
    assert machine == describe()["cpu"]


def test_arrays_are_aligned_wherever_they_come_from():
    def moved(array):
        memory = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:]
        return memory.view(array.dtype).reshape(array.shape)

    order, arrays = ordered(DATA, None)
    moved_arrays = {name: moved(array) for name, array in arrays.items()}
    places = {array.ctypes.data % 4 for array in moved_arrays.values()}
    assert places != {0}
    _, result = work(0, sent(Errand("small", "a")), order, **moved_arrays)
    outcome, _ = cloudpickle.loads(result)
    assert outcome.place % 4 == 0
    _, result = work(0, sent(Errand("small", "a")), order, **arrays)
    assert cloudpickle.loads(result)[0].values == outcome.values  # to the last digit


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("torch", "0.0", r"torch 0\.0"),
        ("batchnorm", "0.0", r"batchnorm 0\.0"),
        ("kernels", ["one", "two"], "kernels one two"),
    ],
)
def test_other_versions_and_kernels_are_refused(name, value, words):
    order, arrays = ordered(DATA, None)
    other = replace(order, made_by={**order.made_by, name: value})
    message = rf"a worker has batchnorm .*, and this process has .*{words}.*the same"
    with pytest.raises(StudyError, match=message) as caught:
        work(0, sent(Errand("small", "a")), other, **arrays)
    assert str(caught.value).isprintable()


def test_a_task_that_cannot_be_read_is_no_outcome():
    order, arrays = ordered(DATA, None)
    with pytest.raises(StudyError, match=r"cannot read its task: .*install there what is here"):
        work(0, b"no pickle", order, **arrays)


def test_event_files_go_to_the_folder(tmp_path):
    order, arrays = ordered(DATA, tmp_path)
    work(0, sent(Errand("small", "write")), order, **arrays)
    assert list((tmp_path / "write").glob("events.out.tfevents.*"))


def test_a_worker_without_tensorboard_is_no_outcome(tmp_path, monkeypatch):
    order, arrays = ordered(DATA, tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError):
        work(0, sent(Errand("small", "write")), order, **arrays)
