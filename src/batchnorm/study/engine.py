"""Does the tasks that are not done yet: many at a time, each one kept as it comes."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import cloudpickle
from joblib import delayed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batchnorm.study import clusters
from batchnorm.study import events as event_files
from batchnorm.study.data import DataSet
from batchnorm.study.errors import printable
from batchnorm.study.processes import KEPT, Call, Together, local
from batchnorm.study.store import Store
from batchnorm.study.tasks import Outcome, StudyError, Task
from batchnorm.study.workers import attempt, nothing, ordered, work

ENGINES = {"joblib": local, "dask": clusters.dask, "ray": clusters.ray}

_LOST = "the process that ran it was lost, perhaps for want of memory"

_Done = tuple[Task[Any], Outcome, str]


def complete(
    tasks: Iterable[Task[Any]],
    data_set: DataSet,
    store: Store,
    *,
    console: Console,
    jobs: int | None = None,
    engine: str = "joblib",
    address: str | None = None,
    events: Path | None = None,
) -> None:
    """Do the tasks that the store does not have.

    A task that fails is an outcome with its reason, and stops no other; so is one whose process
    is lost whenever it runs, while the others of a lost process are done again. What is done is
    kept, whatever ends this call, and no process of it stays behind.

    Args:
        tasks: What is to be done, in about this order.
        data_set: What all tasks are about.
        store: What is done already, and where outcomes go.
        console: Where progress is shown, if it is a terminal.
        jobs: How many tasks are done at a time; by default one on each core.
        engine: One of `ENGINES`: `joblib` for processes of this machine, `dask` or `ray`. What
            must be alone is done in this process all the same.
        address: Where Dask's scheduler or Ray's head is; by default one is started here.
        events: The folder of TensorBoard's event files, if they are wanted.

    Raises:
        StudyError: The engine, its address or the folder cannot be used.
        ModuleNotFoundError: What the engine or the event files need is not installed.
    """
    if engine not in ENGINES:
        raise StudyError(f"{engine}: no such engine; name one of {', '.join(ENGINES)}")
    missing = [task for task in _united(tasks) if task not in store]
    alone = [task for task in missing if task.alone]
    shared = [task for task in missing if not task.alone]
    waiting = dict.fromkeys([*shared, *alone])
    if events:
        events = events.absolute()  # workers may be in another folder
        event_files.check(events)
    with _progress(console) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ tasks (which|have)")  # joblib's, on Ctrl-C
        bar = progress.add_task(_next(waiting), total=len(waiting))
        here = ((task, attempt(task, data_set, events), "") for task in alone)
        with closing(_side_by_side(shared, data_set, events, engine, jobs, address)) as first:
            for task, outcome, machine in chain(first, here):
                store.add(task, outcome, machine)
                del waiting[task]
                progress.update(bar, advance=1, description=_next(waiting))
                progress.refresh()


def _next(waiting: Iterable[Task[Any]]) -> str:
    """Name the task whose turn it is, if any is left."""
    return printable(str(next(iter(waiting), "")))


def _united(tasks: Iterable[Task[Any]]) -> list[Task[Any]]:
    """Join equal tasks to one that asks for what each of them asks for."""
    united: dict[Task[Any], Task[Any]] = {}
    for task in tasks:
        united[task] = united[task].united(task) if task in united else task
    return list(united.values())


def _side_by_side(
    tasks: Sequence[Task[Any]],
    data_set: DataSet,
    events: Path | None,
    engine: str,
    jobs: int | None,
    address: str | None,
) -> Generator[_Done]:
    """Do tasks in the processes of an engine.

    Those under way when a process was lost are done again in two halves, and so on, until a task
    that loses its process is by itself. This ends soon, and leaves no innocent one out.
    """
    if not tasks:
        return
    order, arrays = ordered(data_set, events)
    # Bytes, as only cloudpickle takes along the modules that are registered with it.
    calls = [
        delayed(work)(number, cloudpickle.dumps(task), order, **arrays)
        for number, task in enumerate(tasks)
    ]
    with ENGINES[engine](jobs, address, list(arrays.values())) as together:
        groups = [list(range(len(tasks)))]
        while groups:
            group = groups.pop()
            left = dict.fromkeys(group)
            lost = []
            for number, result in together([calls[each] for each in group]):
                if result is None:
                    lost.append(number)
                else:
                    del left[number]
                    yield tasks[number], *cloudpickle.loads(result)
            suspects = lost or list(left)
            if suspects == group and len(group) == 1:
                _check(together)
                task = tasks[group[0]]
                yield task, task.broken(_LOST), ""
                continue
            half = len(suspects) // 2
            others = left.keys() - suspects
            groups += filter(None, (sorted(others), suspects[half:], suspects[:half]))


def _check(together: Together) -> None:
    """Raise an error if the processes of an engine are lost even when they do nothing."""
    call: Call = delayed(nothing)(0)
    if [result for _, result in together([call])] != [b""]:
        raise StudyError(f"every worker is lost, whatever it does; {KEPT}, with fewer jobs")


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),  # a network may be called anything
        console=console,
        disable=not console.is_terminal,
    )
