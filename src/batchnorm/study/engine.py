"""Does the tasks that are not done yet: many at a time, each one kept as it comes."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from itertools import chain
from typing import Any

from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import BrokenProcessPool, get_reusable_executor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batchnorm.study.data import DataSet
from batchnorm.study.store import Store
from batchnorm.study.tasks import Outcome, StudyError, Task

_Done = tuple[Task[Any], Outcome]


def complete(
    tasks: Sequence[Task[Any]],
    data_set: DataSet,
    store: Store,
    *,
    console: Console,
    jobs: int | None = None,
) -> None:
    """Do the tasks that the store does not have.

    A task that fails is an outcome with its reason, and stops no other. What is done is kept,
    whatever ends this call, and no process of it stays behind.

    Args:
        tasks: What is to be done, in about this order.
        data_set: What all tasks are about.
        store: What is done already, and where outcomes go.
        console: Where progress is shown, if it is a terminal.
        jobs: How many tasks are done at a time; by default one on each core.

    Raises:
        StudyError: A worker process was lost.
    """
    jobs = jobs or cpu_count()
    missing = [task for task in dict.fromkeys(tasks) if task not in store]
    shared = [task for task in missing if not task.alone]
    alone = [task for task in missing if task.alone]
    waiting = dict.fromkeys([*shared, *alone])
    with _progress(console) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ tasks (which|have)")  # joblib's, on Ctrl-C
        bar = progress.add_task(str(next(iter(waiting), "")), total=len(waiting))
        with closing(_side_by_side(shared, data_set, jobs)) as first:
            for task, outcome in chain(first, (_attempt(task, data_set) for task in alone)):
                store.add(task, outcome)
                del waiting[task]
                progress.update(bar, advance=1, description=str(next(iter(waiting), "")))
                progress.refresh()


def _attempt(task: Task[Any], data_set: DataSet) -> _Done:
    """Do one task, and make what goes wrong its outcome."""
    try:
        return task, task.perform(data_set)
    except Exception as error:
        return task, task.outcome(reason=f"{type(error).__name__}: {error}")


def _side_by_side(tasks: Sequence[Task[Any]], data_set: DataSet, jobs: int) -> Generator[_Done]:
    """Do tasks in worker processes: the one place that knows of them."""
    if not tasks:
        return
    try:
        with _interrupts_held():
            done = Parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered")(
                delayed(_work)(task, data_set, os.getpid()) for task in tasks
            )
        yield from done
    except BrokenProcessPool as error:
        raise StudyError(
            "a worker process was lost, perhaps for want of memory; what is finished is kept: "
            "start again to go on, with fewer jobs"
        ) from error
    finally:
        if jobs > 1:
            get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def _work(task: Task[Any], data_set: DataSet, study: int) -> _Done:
    """Do one task in a worker process, which ends when the process of the study has ended."""
    if os.getppid() == study:
        _leave_after(study)
    return _attempt(task, data_set)


@cache
def _leave_after(parent: int) -> None:
    """Watch, from now on, for the end of the parent: a kill gives it no time to end its workers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait while workers start: they inherit that, and leave it to this process."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
    )
