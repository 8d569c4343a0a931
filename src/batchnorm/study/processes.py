"""Calls done side by side, by way of joblib: in processes of this machine, or as others do it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import numpy as np
from joblib import Parallel, cpu_count
from joblib.externals.loky import BrokenProcessPool, get_reusable_executor

from batchnorm.study.tasks import StudyError
from batchnorm.study.workers import reason

KEPT = "what is finished is kept: start again to go on"

# What `joblib.delayed` gives; the first argument is a number, which comes back with the result.
Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
# Takes calls, and yields their numbers and results as they come. The result is None if the process
# of the call was lost; of a call that had not begun then, nothing may be heard.
Together: TypeAlias = Callable[[Sequence[Call]], Iterator[tuple[int, Any]]]


@contextmanager
def local(
    jobs: int | None, address: str | None, _shared: Sequence[np.ndarray] = ()
) -> Iterator[Together]:
    """Let calls be done in processes of this machine, which end with the context.

    Args:
        jobs: How many are done at a time; by default one on each core. One is done in this
            process, where a crash ends everything.
        address: Must be None.

    Yields:
        What does them. Processes get large arrays as files that are mapped to memory.

    Raises:
        StudyError: There is an address, or processes cannot be started.
    """
    if address:
        raise StudyError(f"{address}: joblib works on this machine; name the engine dask or ray")
    jobs = jobs or cpu_count()

    def together(calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        begun: dict[int, None] = {}

        def drawn() -> Iterator[Call]:
            for call in calls:
                begun[number_of(call)] = None
                yield call

        # All processes of a pool are lost with one of them.
        with in_one_line("joblib"), suppress(BrokenProcessPool):
            with interrupts_held():
                results = parallel(drawn(), n_jobs=jobs)
            for number, result in results:
                del begun[number]
                yield number, result
        for number in list(begun):
            yield number, None

    try:
        yield together
    finally:
        if jobs > 1:
            get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def parallel(calls: Iterable[Call], **options: Any) -> Iterator[tuple[int, Any]]:
    """Begin with calls, and return an iterator of their results as they come."""
    results: Iterator[tuple[int, Any]] = Parallel(
        batch_size=1, return_as="generator_unordered", **options
    )(calls)
    return results


def number_of(call: Call) -> int:
    """Return the number that comes back with the result of a call."""
    _, (number, *_), _ = call
    return int(number)


@contextmanager
def in_one_line(where: str) -> Iterator[None]:
    """Say in one line what an engine cannot do; what tasks cannot do are their outcomes.

    Args:
        where: What the line begins with.

    Raises:
        StudyError: For whatever went wrong, but for a module that is missing.
    """
    try:
        yield
    except (StudyError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise StudyError(f"{where}: {reason(error)}; {KEPT}") from error


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait while workers start: they inherit that, and leave it to this process."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
