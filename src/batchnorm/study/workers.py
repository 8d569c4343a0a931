"""What a worker process does: one task at a time, whose failure is its outcome."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass, fields
from functools import cache
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from batchnorm.environment import describe
from batchnorm.study import events, tasks
from batchnorm.study.data import DataSet
from batchnorm.study.errors import printable
from batchnorm.study.tasks import Outcome, StudyError, Task

_ONE_AT_A_TIME = threading.Lock()  # the seed of PyTorch and its threads are a process's, not ours


@dataclass(frozen=True)
class Order:
    """What the tasks of a study have in common.

    Attributes:
        data: The fields of the data set that are no arrays.
        events: The folder of TensorBoard's event files, or None.
        made_by: The versions and the kernels that the outcomes are filed under.
        versions: Those of the extensions, whose modules no worker need have.
        process: The process of the study.
    """

    data: dict[str, Any]
    events: Path | None
    made_by: dict[str, Any]
    versions: dict[str, str]
    process: int


def ordered(data_set: DataSet, events: Path | None) -> tuple[Order, dict[str, np.ndarray]]:
    """Return what the tasks of the study in this process have in common, and the arrays apart."""
    data = {field.name: getattr(data_set, field.name) for field in fields(data_set)}
    arrays = {name: value for name, value in data.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in data.items() if name not in arrays}
    return Order(rest, events, tasks._makers(), tasks.VERSIONS, os.getpid()), arrays


def work(number: int, task: bytes, order: Order, **arrays: np.ndarray) -> tuple[int, bytes]:
    """Do one task in a process of an engine.

    Args:
        number: Comes back with the outcome.
        task: As cloudpickle wrote it.
        order: What it has in common with the others.
        **arrays: The fields of the data set that are arrays.

    Returns:
        The number; and the outcome with the name of this processor, as cloudpickle writes them.

    Raises:
        StudyError: This process is not fit for the study.
        ModuleNotFoundError: Event files are wanted, and TensorBoard is not installed here.
    """
    here = tasks._makers()
    if here != order.made_by:
        raise StudyError(
            f"a worker has {_words(here)}, and this process has {_words(order.made_by)}, "
            "which would give other outcomes; install the same on both"
        )
    # A process of loky's is a child of the study, even where the study has ended meanwhile.
    if os.getppid() == order.process or current_process().name.startswith("LokyProcess"):
        _leave_after(order.process)
    if order.events:
        events.check(order.events)
    with _ONE_AT_A_TIME:
        tasks.VERSIONS.update(order.versions)
        try:
            read: Task[Any] = cloudpickle.loads(task)
        except Exception as error:
            raise StudyError(
                f"a worker cannot read its task: {reason(error)}; install there what is here"
            ) from error
        # Sums depend on it in the last digit; Dask's messages may put arrays at any byte.
        aligned = {name: np.require(array, requirements="A") for name, array in arrays.items()}
        data: dict[str, Any] = {**order.data, **aligned}
        outcome = attempt(read, DataSet(**data), order.events)
    return number, cloudpickle.dumps((outcome, _here()["cpu"]))


def nothing(number: int) -> tuple[int, bytes]:
    """Do nothing, to show that a process can."""
    return number, b""


def attempt(task: Task[Any], data_set: DataSet, folder: Path | None) -> Outcome:
    """Do one task, and make what goes wrong its outcome.

    Args:
        task: What is done.
        data_set: What it is about.
        folder: Where event files go, if anywhere.
    """
    try:
        with events.into(folder):
            outcome: Outcome = task.perform(data_set)
        json.dumps(asdict(outcome), allow_nan=False)  # or else it could not be kept
    except (Exception, SystemExit) as error:
        return task.broken(reason(error))
    return outcome


def reason(error: BaseException) -> str:
    """Say in one printable line what went wrong."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return printable(f"{type(error).__name__}: {first}".removesuffix(": "))


@cache
def _here() -> dict[str, str]:
    return describe()


def _words(makers: dict[str, Any]) -> str:
    """Say which versions and kernels these are."""
    texts = {name: " ".join(it) if isinstance(it, list) else it for name, it in makers.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


@cache
def _leave_after(parent: int) -> None:
    """Watch, from now on, for the end of the parent: a kill gives it no time to end its workers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
