"""How a time is taken: in turn, so that what stands side by side was measured at one moment."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import torch

#: How often each is timed at least.
LEAST_ROUNDS = 5
_COPIED = 2**26  # float32 values: 256 MB


def alternate(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = LEAST_ROUNDS,
    *,
    settled: bool = False,
) -> dict[str, list[float]]:
    """Return the times of every call in seconds, a round after the other.

    Who begins a round turns, too, for what ran before leaves its traces in the caches. What a call
    returns is freed inside its time. All calls were made before: there is nothing to warm up.

    Args:
        calls: What is timed.
        seconds: When to stop.
        least: How many rounds there are at least.
        settled: Whether each is called once, untimed, before it is timed: what then is timed
            follows on one of its own kind, as the steps of a training do.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    end = time.perf_counter() + seconds
    with _no_garbage():
        while time.perf_counter() < end or len(times[order[0][0]]) < least:
            for name, call in order:
                if settled:
                    call()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            order.append(order.pop(0))
    return times


def copy_speed(rounds: int = 9, values: int = _COPIED) -> float:
    """Return how many bytes a second a large copy reads and writes, into mapped memory.

    Args:
        rounds: How many copies the median is of.
        values: How many float32 values are copied.
    """
    source, target = torch.full((values,), 1.0), torch.full((values,), 2.0)
    times = alternate({"copy": lambda: target.copy_(source)}, 0, rounds)["copy"]
    return 2 * source.nbytes / median(times)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Keep the collector of cycles from running inside."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
