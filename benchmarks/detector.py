"""How often `ShiftDetector` is wrong, how soon it is right, and what it costs.

`python -m benchmarks.detector` runs it over streams of scikit-learn's digits, clean and shifted,
times it beside ResNet-50 without it, and writes what came of that into docs/shift.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import quantiles

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.console import Console

import batchnorm as bn
from batchnorm.bench.conduct import shown_on
from batchnorm.bench.harness import alternate
from batchnorm.bench.save import put
from batchnorm.study.shifts import SEVERITIES, SHIFTS
from benchmarks.drawn_streams import LENGTH, WINDOW, alarms
from benchmarks.models.measure import ROOT
from benchmarks.models.networks import NETWORKS, pose

BEGIN = "<!-- detector: written by `python -m benchmarks.detector` -->"
END = "<!-- end of detector -->"
TRAINED = ("relu", "relu, after", "conv")
CLEAN = 1000  # streams
SHIFTED = 50  # streams of each shift
ROUNDS = 25
CHUNK = 50  # streams that a process does at a time


def cost(quick: bool) -> tuple[float, ...]:
    """Return quartiles of what hearing adds to a forward pass of ResNet-50, of 1."""
    network = NETWORKS["resnet50"].quick() if quick else NETWORKS["resnet50"]
    posed = pose(network, "NHWC")
    detector = bn.ShiftDetector(posed.inference, window=WINDOW)

    def run() -> None:
        with torch.no_grad():
            posed.inference(posed.images)

    def heard() -> None:
        with detector:
            run()

    calls: dict[str, Callable[[], object]] = {"without": run, "with": heard}
    for call in calls.values():
        call()
    times = alternate(calls, 0, ROUNDS, settled=True)
    pairs = zip(times["with"], times["without"], strict=True)
    return tuple(quantiles([b / a - 1 for b, a in pairs], n=4))


def main() -> None:
    """Measure, and write the tables of docs/shift.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few streams; nothing is written")
    quick = parser.parse_args().quick
    clean, shifted = (CHUNK, 5) if quick else (CLEAN, SHIFTED)
    tasks: list[tuple[str, str | None, int, range]] = [
        (network, None, 0, range(at, min(at + CHUNK, clean)))
        for network in TRAINED
        for at in range(0, clean, CHUNK)
    ]
    tasks += [
        (network, name, severity, range(shifted))
        for network in TRAINED
        for name in SHIFTS
        for severity in SEVERITIES
    ]
    console = Console()
    low, middle, high = cost(quick)  # before the processors have other work
    found: dict[tuple[str, str | None, int], list[int]] = {}
    with shown_on(console) as progress:
        bar = progress.add_task("streams", total=len(tasks))
        results = Parallel(n_jobs=-1, return_as="generator")(
            delayed(alarms)(*task) for task in tasks
        )
        for task, result in zip(tasks, results, strict=True):
            found.setdefault(task[:3], []).extend(result)
            progress.advance(bar)
    text = written(found, clean, (low, middle, high))
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if not quick:
        put(ROOT / "docs" / "shift.md", BEGIN, text, END)


def written(
    found: dict[tuple[str, str | None, int], list[int]], clean: int, quartiles: tuple[float, ...]
) -> str:
    """Return the tables.

    Args:
        found: The alarms, by network, shift and severity.
        clean: How many clean streams there were.
        quartiles: Of the cost.
    """
    run_length = 1000
    expected = 1 - np.exp(-LENGTH / run_length)
    lines = [
        f"Clean streams of {LENGTH} windows of {WINDOW} examples, with `run_length={run_length}`, "
        f"by which at most {expected:.1%} of them have a false alarm:",
        "",
        "| network | streams | with a false alarm |",
        "| --- | ---: | ---: |",
    ]
    for network in TRAINED:
        share = np.mean(np.array(found[network, None, 0]) > 0)
        lines.append(f"| {network} | {clean:,} | {share:.1%} |")
    lines += [
        "",
        "Windows until the alarm, the median, by severity; – where fewer than half of the streams "
        f"had one within {LENGTH}:",
        "",
        f"| network | shift | {' | '.join(map(str, SEVERITIES))} |",
        f"| --- | --- | {' | '.join(['---:'] * len(SEVERITIES))} |",
    ]
    for network in TRAINED:
        for name in SHIFTS:
            delays = []
            for severity in SEVERITIES:
                when = np.array(found[network, name, severity])
                median = np.median(np.where(when > 0, when, np.inf))
                delays.append("–" if np.isinf(median) else f"{median:g}")
            lines.append(f"| {network} | {name} | {' | '.join(delays)} |")
    low, middle, high = quartiles
    lines += [
        "",
        f"To hear ResNet-50, 16x224x224, takes {middle:.1%} of the time of its inference "
        f"(quartiles of {ROUNDS} rounds: {low:.1%} to {high:.1%}), with a look at every window.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
