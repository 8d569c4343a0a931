"""Calls done in the processes of a cluster, by way of joblib: Dask's or Ray's."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
from joblib import cpu_count

from batchnorm.study.processes import (
    KEPT,
    Call,
    Together,
    in_one_line,
    interrupts_held,
    number_of,
    parallel,
)
from batchnorm.study.tasks import StudyError
from batchnorm.study.workers import reason

_ANSWER = 10  # seconds that a cluster has to answer
_WORKER = 30  # seconds that it has to start a worker


@contextmanager
def dask(
    jobs: int | None, address: str | None, shared: Sequence[np.ndarray] = ()
) -> Iterator[Together]:
    """Let calls be done by Dask.

    Args:
        jobs: How many are done at a time; by default one on each core.
        address: Where the scheduler is, as `tcp://host:8786`. By default one is started here, with
            so many workers, and ends with the context.
        shared: Large arguments of the calls: they go to each worker once.

    Yields:
        What does them.

    Raises:
        StudyError: Nothing answers at the address, or there is no worker.
        ModuleNotFoundError: Dask is not installed.
    """
    distributed: Any = import_module("distributed")
    from joblib._dask import DaskDistributedBackend

    given_up = distributed.KilledWorker, distributed.CancelledError
    pending: set[Future[Any]] = set()

    class Backend(DaskDistributedBackend):  # type: ignore[misc]
        def submit(self, func: Any, callback: Any = None) -> Any:
            told = _told(func, callback, given_up)
            future = super().submit(func, told)
            pending.add(future)
            future.add_done_callback(pending.discard)
            # Without this, joblib waits for ever for what Dask has given up.
            future.add_done_callback(lambda it: told(it.exception()) if it.exception() else None)
            return future

        def effective_n_jobs(self, n_jobs: int) -> int:
            cores: int = super().effective_n_jobs(n_jobs)
            return max(2, cores)  # the work of one would be done in this process

    def together(calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        with in_one_line(where):
            try:
                client.wait_for_workers(1, timeout=_WORKER)
            except TimeoutError as error:
                raise StudyError(f"{where}: it has no worker; start one") from error
            # Anew each time: what is scattered can be lost with the processes that had it.
            backend = Backend(client=client, scatter=list(shared))
            yield from parallel(calls, n_jobs=-1, backend=backend, pre_dispatch=jobs or "all")

    def watch() -> None:
        """Say that the scheduler is lost: joblib would wait for ever for what is pending."""
        while client.status != "closed":
            time.sleep(1)
        for future in list(pending):
            with suppress(InvalidStateError):
                future.set_exception(StudyError(f"{where}: the scheduler was lost; {KEPT}"))

    where = f"Dask at {address}" if address else "Dask"
    with ExitStack() as stack:
        with in_one_line(where):
            place: Any = address
            if address:
                _knock(address, "tcp://host:8786")
            else:
                if os.name == "posix":
                    resource_tracker.ensure_running()  # where it starts, Ctrl-C is let through
                with interrupts_held():
                    place = distributed.LocalCluster(
                        n_workers=jobs or cpu_count(),
                        threads_per_worker=1,
                        memory_limit=0,
                        dashboard_address=None,
                        silence_logs=logging.CRITICAL,
                        scheduler_kwargs={"allowed_failures": 0},  # the study begins them again
                    )
                stack.enter_context(place)
            client = distributed.Client(place, timeout=_ANSWER, set_as_default=False)
            stack.enter_context(client)
        threading.Thread(target=watch, daemon=True).start()
        yield together


@contextmanager
def ray(
    jobs: int | None, address: str | None, _shared: Sequence[np.ndarray] = ()
) -> Iterator[Together]:
    """Let calls be done by Ray.

    Args:
        jobs: How many are done at a time; by default one on each core.
        address: Where the head is, as `host:6379`. By default one is started here, with so many
            workers, and ends with the context.

    Yields:
        What does them. Ray itself keeps large arguments in memory that processes share.

    Raises:
        StudyError: Nothing answers at the address.
        ModuleNotFoundError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends them home otherwise
    library: Any = import_module("ray")
    base: Any = import_module("ray.util.joblib.ray_backend").RayBackend

    class Backend(base):  # type: ignore[misc]
        supports_return_generator = True

        def submit(self, func: Any, callback: Any = None) -> Any:
            return super().submit(func, _told(func, callback, library.exceptions.RayError))

    def together(calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        with in_one_line(where):
            backend = Backend(ray_remote_args={"num_cpus": 1, "max_restarts": -1})
            ahead = 1 if jobs == 1 else "2*n_jobs"
            yield from parallel(calls, n_jobs=processes, backend=backend, pre_dispatch=ahead)

    where = f"Ray at {address}" if address else "Ray"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        with in_one_line(where):
            if address:
                _knock(address, "host:6379")
                library.init(address, **quiet)
                jobs = jobs or int(library.cluster_resources()["CPU"])
                processes = max(2, jobs)  # the work of one would be done in this process
            else:
                jobs = jobs or cpu_count()
                processes = max(2, jobs)
                with interrupts_held():
                    library.init("local", num_cpus=processes, include_dashboard=False, **quiet)
        yield together
    finally:
        library.shutdown()


def _told(func: Any, callback: Any, lost: Any) -> Callable[[Any], None]:
    """Make the loss of a process the result of its call, where joblib would end all of them."""
    (call,) = func.items
    return lambda out: callback([(number_of(call), None)] if isinstance(out, lost) else out)


def _knock(address: str, form: str) -> None:
    """Find out in a short time whether anything is at an address."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdecimal()):
        raise StudyError(f"{address}: not an address; give it as {form}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise StudyError(
            f"{address}: nothing answers there: {reason(error)}; give it as {form}"
        ) from error
