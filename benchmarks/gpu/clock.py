"""How a time is taken on a GPU: by its own events, in turn, and as a graph without its launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from batchnorm.bench.contenders import Step
from batchnorm.bench.harness import _no_garbage
from batchnorm.bench.harness import copy_speed as copy_speed_of_cpu

Name = TypeVar("Name", bound=Hashable)

#: How often each is called before it is timed.
WARMUP = 3
_COPIED = 2**30  # bytes
_COPIES = 20


class Timed(NamedTuple):
    """What is timed.

    Attributes:
        calls: Do the same with different memory; they take turns.
        is_on_stream: Whether events of torch can time them; else a call returns when all is done.
        parts: How many times each of them does it.
    """

    calls: Sequence[Callable[[], object]]
    is_on_stream: bool = True
    parts: int = 1


def alternate(
    timed: Mapping[Name, Timed],
    device: torch.device,
    seconds: float,
    least: int,
    *,
    settled: bool = False,
) -> dict[Name, list[float]]:
    """Return the times of all in seconds, a round after the other.

    Who begins a round turns, too, and each takes other inputs than those around it, if there are
    as many. A time is that of one call with its launches, begun when the
    device has nothing left to do. What a call returns is freed before the next one.

    Args:
        timed: What is timed; each was called before.
        device: Where the work is done.
        seconds: When to stop.
        least: How many rounds there are at least.
        settled: Whether each is called once, untimed, before it is timed.
    """
    times: dict[Name, list[float]] = {name: [] for name in timed}
    order, places = list(timed.items()), {name: place for place, name in enumerate(timed)}
    end = time.perf_counter() + seconds
    rounds = 0
    with _no_garbage():
        while rounds < least or time.perf_counter() < end:
            for name, (calls, is_on_stream, parts) in order:
                call = calls[(rounds + places[name]) % len(calls)]
                if settled:
                    call()
                events = is_on_stream and device.type == "cuda"
                took = (_by_events if events else _by_clock)(call, device)
                times[name].append(took / parts)
            order.append(order.pop(0))
            rounds += 1
    return times


def _by_events(call: Callable[[], object], device: torch.device) -> float:
    begin, end = (_event() for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _by_clock(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy_speed(device: torch.device) -> float:
    """Return how many bytes a second a large copy on a device reads and writes.

    Args:
        device: Where.
    """
    if device.type != "cuda":
        return copy_speed_of_cpu(3, 2**22)
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    copy = Timed([lambda: target.copy_(source)])
    for _ in range(WARMUP):
        target.copy_(source)
    return 2 * _COPIED / median(alternate({"copy": copy}, device, 0, _COPIES)["copy"])


def captured(steps: Sequence[Step]) -> Step:
    """Return a step that replays the launches of others, behind each other, from one graph.

    Args:
        steps: What is captured; the results are those of the last.

    Raises:
        RuntimeError: They do what a graph cannot hold.
    """
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for step in steps:
            for _ in range(WARMUP):
                step.call()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [step.call() for step in steps]

    def replay() -> object:
        graph.replay()
        return results[-1]

    return Step(replay, steps[-1].read)
