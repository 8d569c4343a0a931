"""When results are better written past the caches: `python -m benchmarks.streaming`.

A write through the caches reads first what it overwrites. One past them does not, but leaves the
result in none of them for what reads it next. So it is timed with that: layers behind each other,
BN + ReLU, each of which reads at once what the one before wrote, and on the way back the gradient
that the one behind wrote. In training all results are kept; in inference each is freed when it was
read, and the next but one lies in its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import quantiles

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.harness import alternate, threads
from batchnorm.kernels import native

#: Around where the kernels begin to write past the caches, and far beyond.
SHAPES = [(examples, 64, 56, 56) for examples in (4, 8, 16, 32, 128)]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

#: What the results of all layers take, in bytes: as in a whole network, more than the caches hold.
ALL_RESULTS = 4e8

#: Results go past the caches where the last one holds no more than so many of them, see
#: `goes_past_cache` in driver.h.
IN_CACHE = 8


def steps(x: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """Return a step of training and one of inference.

    Args:
        x: The batch.
        dy: The gradient of what comes out.
    """
    depth = max(2, round(ALL_RESULTS / x.nbytes))
    layers = [bn.BatchNorm2d(x.shape[1], activation="relu") for _ in range(2 * depth)]
    trained, fixed = nn.Sequential(*layers[:depth]), nn.Sequential(*layers[depth:]).eval()
    inputs = [x.requires_grad_(), *trained.parameters()]

    def train() -> None:
        torch.autograd.grad(trained(x), inputs, dy)

    @torch.no_grad()
    def infer() -> None:
        fixed(x)

    return {"training": train, "inference": infer}


def compare(step: Callable[[], object], bytes_a_result: int, seconds: float) -> list[float]:
    """Return the quartiles of the time past the caches as a part of that through them.

    Args:
        step: What is timed.
        bytes_a_result: How large its results are.
        seconds: How long it is timed.
    """

    def with_cache_of(size: int) -> Callable[[], object]:
        def pretended() -> None:
            native._native.pretend_cache(size)
            step()

        return pretended

    # sizes so close that nothing else depends on which it is
    size = IN_CACHE * bytes_a_result
    calls = {"past": with_cache_of(size), "through": with_cache_of(size + 1)}
    try:
        for call in calls.values():
            call()
        times = alternate(calls, seconds)
    finally:
        native._native.pretend_cache(0)
    return quantiles((a / b for a, b in zip(*times.values(), strict=True)), n=4)


def main(seconds: float = 5.0) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Print the time past the caches as a part of that through them, and return its quartiles.

    Args:
        seconds: How long each step is timed.
    """
    last = native._native.cache_bytes()
    table = Table(title="time past the caches / through them, one thread: median (quartiles)")
    for title in ("layout", "shape", "MB", f"past a cache of {last >> 20} MB"):
        table.add_column(title)
    for title in ("training", "inference"):
        table.add_column(title, justify="right")
    ratios = {}
    for layout, memory_format in LAYOUTS.items():
        for shape in SHAPES:
            x, dy = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
            with threads(1), bn.backend("native"):
                found = {n: compare(f, x.nbytes, seconds) for n, f in steps(x, dy).items()}
            size, goes_past = "x".join(map(str, shape)), IN_CACHE * x.nbytes >= last
            ratios[layout, size] = found
            table.add_row(
                layout,
                size,
                f"{x.nbytes / 1e6:.3g}",
                "yes" if goes_past else "no",
                *(f"{mid:.2f} ({low:.2f}–{high:.2f})" for low, mid, high in found.values()),
            )
    Console().print(table)
    return ratios


if __name__ == "__main__":
    main()
