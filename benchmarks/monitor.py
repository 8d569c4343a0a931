"""What a monitor costs of a training step: `python -m benchmarks.monitor`.

A step that is recorded, and one that is not, are timed in turn with one without a monitor. One in
`every` is recorded, so that is what the first counts on the whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from batchnorm.bench.conduct import say_if_busy
from batchnorm.bench.harness import alternate
from batchnorm.bench.rows import ratios
from batchnorm.diagnose.monitor import Monitor
from benchmarks.models.networks import NETWORKS, Network, pose

NEVER = 10**9  # so many steps that only the first is recorded


def steps(network: Network) -> dict[str, Callable[[], object]]:
    """Return a training step without a monitor, with one that records it, and one that does not.

    Args:
        network: What is trained, by SGD.
    """
    posed = pose(network)
    optimizer = torch.optim.SGD(posed.training.parameters(), lr=0.001)

    def step() -> None:
        optimizer.zero_grad()
        loss = cross_entropy(posed.training(posed.images).logits, posed.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def with_monitor(every: int) -> Callable[[], None]:
        monitor = Monitor(posed.training, every=every)

        def watched() -> None:
            with monitor:
                step()

        watched()
        return watched

    step()
    return {"without": step, "recorded": with_monitor(1), "not recorded": with_monitor(NEVER)}


def main(network: Network, seconds: float = 180.0) -> dict[str, tuple[float, float, float]]:
    """Print the quartiles of the time with a monitor, as parts of that without, and return them.

    Args:
        network: What is trained.
        seconds: How long it is timed.
    """
    console = Console()
    say_if_busy(console)
    times = alternate(steps(network), seconds)
    every = Monitor(network.make()).every
    times[f"one in {every} recorded"] = [
        other + (recorded - other) / every
        for recorded, other in zip(times["recorded"], times["not recorded"], strict=True)
    ]
    found = {name: ratios(own, times["without"]) for name, own in times.items()}
    table = Table(
        title=f"{network.title}, {network.batch} images of {network.image}²: time of a step"
    )
    for title in ("step", "first quartile", "median", "third quartile"):
        table.add_column(title, justify="left" if title == "step" else "right")
    for name, quartiles in found.items():
        table.add_row(name, *(f"{ratio:.3f}" for ratio in quartiles))
    console.print(table)
    console.print(f"{len(times['without'])} rounds, {torch.get_num_threads()} threads")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="by default %(default)s")
    main(NETWORKS["resnet50"].with_images(8, 128), parser.parse_args().seconds)
