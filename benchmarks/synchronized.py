"""What it costs to synchronize, and what it buys: `python -m benchmarks.synchronized`.

A model of the two collectives by the number of processes, in latency and bytes, printed as the
table of docs/synchronized.md and drawn as its figure. With `--measure`, the layer itself is timed
beside a local one, over processes of this machine.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Literal

import torch
import torch.distributed as dist
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import batchnorm as bn
from batchnorm.bench.errors import WrongResult
from batchnorm.bench.harness import alternate
from benchmarks.collectives import (
    GATHERS,
    GPUS,
    SUMS,
    crossing,
    resnet50,
    row_bytes,
    standard_error,
    sums_bytes,
    wait,
    wait_by_two_sums,
)

FIGURE = Path(__file__).parent.parent / "docs" / "assets" / "synchronized.svg"

CHANNELS = 256
PROCESSES = (2, 4, 8, 16, 64, 256, 1024, 4096, 10_000)
#: Values a channel has on a process: 2 and 32 images of 7 x 7 and 56 x 56.
VALUES = (2 * 7**2, 32 * 7**2, 2 * 56**2, 32 * 56**2)


def costs() -> str:
    """Return the table of what a layer costs, in Markdown."""
    rows = [
        "| processes | received forward | ring | tree | by nodes | received backward | ring | tree"
        " | by nodes | both ways | ResNet-50 |",
        "| --: |" + " --: |" * 10,
    ]
    row, sums = row_bytes(CHANNELS), sums_bytes(CHANNELS)
    for p in PROCESSES:
        network = sum(wait(GPUS, p, each) for each in resnet50())
        cells = [
            f"{p:,}",
            _bytes((p - 1) * row),
            *(_micro(gather(GPUS, p, row)) for gather in GATHERS.values()),
            _bytes(2 * (p - 1) / p * sums),
            *(_micro(add(GPUS, p, sums)) for add in SUMS.values()),
            _micro(wait(GPUS, p, CHANNELS)),
            f"{network * 1e3:.1f} ms",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def gains() -> str:
    """Return the table of how exact the statistics become, in Markdown."""
    sizes = (1, 2, 8, 64, 1024, 10_000)
    rows = [
        f"| values a channel and process | {' | '.join(f'{p:,}' for p in sizes)} |",
        f"| --: |{' --: |' * len(sizes)}",
    ]
    for values in VALUES:
        cells = (f"{100 * standard_error(values, p):.2g}%" for p in sizes)
        rows.append(f"| {values:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _bytes(number: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def svg() -> str:
    """Return an SVG file of what a layer waits, and how exact its statistics are."""
    sizes = [round(2 ** (i / 4)) for i in range(4, 54)]
    sizes = sorted({p for p in sizes if p <= PROCESSES[-1]} | {PROCESSES[-1]})
    row, sums = row_bytes(CHANNELS), sums_bytes(CHANNELS)
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, gather), add, colour in zip(
        GATHERS.items(), SUMS.values(), ("#8b949e", "#d29922", "#1f6feb"), strict=True
    ):
        times = [1e6 * (gather(GPUS, p, row) + add(GPUS, p, sums)) for p in sizes]
        left.plot(
            sizes, times, color=colour, label="by nodes" if name == "nodes" else f"by {name}s"
        )
    times = [1e6 * wait_by_two_sums(GPUS, p, CHANNELS) for p in sizes]
    left.plot(sizes, times, color="#a371f7", linestyle="--", label="two sums, no gather")
    for group, style in ((8, ":"), (64, "-.")):
        time = 1e6 * wait(GPUS, group, CHANNELS)
        left.plot([group, sizes[-1]], [time] * 2, color="#2da44e", linestyle=style,
                  label=f"groups of {group}")  # fmt: skip
    left.set_title(f"microseconds a layer waits, {CHANNELS} channels", loc="left", fontsize=11)
    colours = ("#1f6feb", "#a371f7", "#d29922", "#8b949e")
    for values, colour in zip(VALUES, colours, strict=True):
        errors = [100 * standard_error(values, p) for p in [1, *sizes]]
        right.plot([1, *sizes], errors, color=colour, label=f"{values:,} values a process")
    right.axhline(1.6, color="#888888", linewidth=1, linestyle=":")
    right.annotate(
        "4,000 values in all", (sizes[-1], 1.75), ha="right", color="#666666", fontsize=8
    )
    right.set_title("standard error of the mean, % of the deviation", loc="left", fontsize=11)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="processes that normalize together")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_minor_formatter(lambda value, _: "")
        axes.grid(color="#dde1e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    content = io.StringIO()
    with rc_context({"svg.hashsalt": "synchronized"}):  # the same bytes each time
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "".join(f"{line.rstrip()}\n" for line in content.getvalue().splitlines())


#: What is timed: its shape on each process.
SHAPES = ((8, 256, 7, 7), (8, 64, 56, 56))
#: How far y and dx may be from those of one process with the whole batch.
TOLERANCE = 1e-5


def measure(
    sizes: Sequence[int] = (1, 2, 3, 4), rounds: int = 300
) -> dict[tuple[int, str], dict[str, list[float]]]:
    """Return the times of a training step of a layer by itself, local and synchronized.

    Args:
        sizes: Over how many processes of this machine.
        rounds: How often each is timed; they take turns.

    Returns:
        (processes, shape) -> name -> the seconds of the first process, a round each.

    Raises:
        WrongResult: Synchronized, the layer does not compute what one process would.
    """
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_measure_as, (size, folder, rounds), nprocs=size)  # type: ignore[no-untyped-call]
            times = json.loads((Path(folder) / "times").read_text())
        found |= {(size, shape): each for shape, each in times.items()}
    return found


def _measure_as(rank: int, size: int, folder: str, rounds: int) -> None:
    """Time the layer as one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = {}
    for shape in SHAPES:
        calls = {"local": _step(rank, shape, None), "synchronized": _step(rank, shape, "world")}
        found["x".join(map(str, shape))] = alternate(calls, 0, rounds)
    if rank == 0:
        (Path(folder) / "times").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _step(
    rank: int, shape: tuple[int, ...], group: Literal["world"] | None
) -> Callable[[], object]:
    """Return a training step of a rank, which was checked."""
    size = 1 if group is None else dist.get_world_size()
    own = slice(rank * shape[0], (rank + 1) * shape[0]) if group else slice(None)
    torch.manual_seed(0)
    wide, upstream = (torch.randn(size * shape[0], *shape[1:]) for _ in range(2))
    x, dy = wide[own].clone().requires_grad_(), upstream[own].clone()
    layer = bn.BatchNorm2d(shape[1], process_group=group)

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

    wide = wide.double().requires_grad_()
    y = bn.BatchNorm2d(shape[1], dtype=torch.float64)(wide)
    (dx,) = torch.autograd.grad(y, wide, upstream.double())
    for name, found, expected in zip(("y", "dx"), step(), (y, dx), strict=False):
        error = float((found - expected[own]).detach().abs().max())
        if not error <= TOLERANCE * float(expected.detach().abs().max()):
            raise WrongResult(f"{name} is off by {error:g}")
    return step


def show(times: dict[tuple[int, str], dict[str, list[float]]]) -> None:
    """Print what `measure` found.

    Args:
        times: That.
    """
    table = Table(
        title="forward and backward, us: median (quartiles); one thread each, "
        f"{os.cpu_count()} cores"
    )
    for title in ("processes", "shape of each", "local", "synchronized", "more"):
        table.add_column(title, justify="left" if title == "shape of each" else "right")
    for (size, shape), each in times.items():
        low, mid, high = zip(*(quantiles(t, n=4) for t in each.values()), strict=True)
        cells = (
            f"{m * 1e6:.0f} ({a * 1e6:.0f}–{b * 1e6:.0f})"
            for a, m, b in zip(low, mid, high, strict=True)
        )
        table.add_row(str(size), shape, *cells, f"{(mid[1] - mid[0]) * 1e6:.0f}")
    Console().print(table)
    if max(size for size, _ in times) > (os.cpu_count() or 1):
        print("There are more processes than cores: they compete, and wait for one another.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the model and draw its figure; or measure.

    Args:
        arguments: Of the command line; those it was called with if left out.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synchronized")
    parser.add_argument("--measure", action="store_true", help="time the layer over processes")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the figure goes")
    chosen = parser.parse_args(arguments)
    if chosen.measure:
        show(measure())
        return
    print(costs(), gains(), sep="\n\n")
    pays = crossing(GPUS, CHANNELS)
    print(f"\nTwo sums in place of the gather are faster from {pays:,} processes on.")
    chosen.figure.write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
