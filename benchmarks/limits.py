"""How near to what is possible ResNet-50 comes: `python -m benchmarks.limits`.

The model is timed as it is, with our tools, and without batch norms and activations, which no tool
can be faster than: with one call of each in turn, and with two in a turn, of which the second is
timed, as `make bench-models` does. Beside it stands what batch norm at the speed of a copy allows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from batchnorm.bench.conduct import say_if_busy, shown_on
from batchnorm.bench.harness import alternate, copy_speed
from batchnorm.bench.rows import ratios
from batchnorm.bench.save import put
from benchmarks.models.measure import ROOT
from benchmarks.models.networks import FORMATS, NETWORKS, Posed, pose
from benchmarks.models.ways import ACCELERATED, FOLDED, SAVING, STOCK, Inference, Training, Way

BEGIN, END = "<!-- limits: written by `python -m benchmarks.limits` -->", "<!-- end of limits -->"
ROUNDS = 10
TURNS = {"one in a turn": False, "two in a turn": True}
#: How often a batch is read or written at least in a training step: 2 forward and 3 backward where
#: what is read again stays in cache, and else 3 and 5.
PASSES = (5, 8)


def _without(model: nn.Module, _: Tensor) -> nn.Module:
    """Put identities in the place of batch norms, and of activations in training."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) or (isinstance(child, nn.ReLU) and child.training):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.ReLU):
                child.inplace = True
    return model


WITHOUT = Way("without", _without)
KINDS = (
    ("step", Training, (STOCK, ACCELERATED, SAVING, WITHOUT)),
    ("inference", Inference, (STOCK, FOLDED, WITHOUT)),
)


def normalized(posed: Posed) -> int:
    """Return how many bytes all batch norms of a model return.

    Args:
        posed: The model.
    """
    sizes: list[int] = []

    def note(_: nn.Module, __: Any, y: Tensor) -> None:
        sizes.append(y.nbytes)

    norms = [m for m in posed.training.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(note) for norm in norms]
    try:
        posed.training(posed.images)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(sizes)


def limits(quick: bool, console: Console) -> str:
    """Measure, and return the table.

    Args:
        quick: Whether the network is small, and timed a few times.
        console: Where it is shown how far it is.
    """
    network = NETWORKS["resnet50"]
    columns: dict[str, dict[str, str]] = {}
    say_if_busy(console)
    with shown_on(console) as progress:
        bar = progress.add_task("", total=len(FORMATS) * len(KINDS) * len(TURNS))
        for layout in FORMATS:
            posed = pose(network.quick() if quick else network, layout)
            crossing = normalized(posed) / copy_speed()
            for what, kind, ways in KINDS:
                progress.update(bar, description=f"{layout}, {what}", refresh=True)
                calls: dict[str, Callable[[], object]] = {w.name: kind(w, posed) for w in ways}
                for call in calls.values():
                    call()
                for turn, settled in TURNS.items():
                    times = alternate(calls, 0, 3 if quick else ROUNDS, settled=settled)
                    column = columns.setdefault(f"{layout}, {turn}", {})
                    for way in ways[1:]:
                        low, middle, high = ratios(times[STOCK.name], times[way.name])
                        column[f"{what}, {way.name}"] = f"{middle:.2f}x ({low:.2f} to {high:.2f})"
                    if kind is Training:
                        stock, bare = (median(times[way.name]) for way in (STOCK, WITHOUT))
                        for passes in PASSES:
                            speed = stock / (bare + passes * crossing)
                            column[f"{what}, {passes} passes at copy speed"] = f"{speed:.2f}x"
                    progress.advance(bar)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(column[name] for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, and write the table of docs/bench.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network; nothing is written")
    quick = parser.parse_args().quick
    console = Console()
    table = limits(quick, console)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    if not quick:
        put(ROOT / "docs" / "bench.md", BEGIN, table, END)


if __name__ == "__main__":
    main()
