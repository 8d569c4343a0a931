"""What batch norm costs ResNet-50 at most, and what a turn does to a ratio.

`python -m benchmarks.limits NHWC` times the model as it is, with our tools, and without batch norms
and activations at all, which no tool can be faster than: with single calls in turn, and with two in
a turn, of which the second is timed, as `make bench-models` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import Tensor, nn

from batchnorm.bench.harness import alternate
from batchnorm.bench.rows import ratios
from benchmarks.models.networks import FORMATS, NETWORKS, pose
from benchmarks.models.ways import ACCELERATED, FOLDED, SAVING, STOCK, Inference, Training, Way

ROUNDS = 10


def _bare(model: nn.Module, _: Tensor) -> nn.Module:
    """Put identities in the place of batch norms, and of activations in training."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) or (isinstance(child, nn.ReLU) and child.training):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.ReLU):
                child.inplace = True
    return model


BARE = Way("without", _bare)


def main(layout: str) -> None:
    """Measure, and print the quartiles of every way's speed."""
    posed = pose(NETWORKS["resnet50"], layout)
    for kind, ways in (
        (Training, (STOCK, ACCELERATED, SAVING, BARE)),
        (Inference, (STOCK, FOLDED, BARE)),
    ):
        calls: dict[str, Callable[[], object]] = {way.name: kind(way, posed) for way in ways}
        for call in calls.values():
            call()
        for settled in (False, True):
            times = alternate(calls, 0, ROUNDS, settled=settled)
            for name, own in times.items():
                low, middle, high = ratios(times[STOCK.name], own)
                turn = "two in a turn" if settled else "one in a turn"
                print(f"{kind.__name__}, {turn}, {name}: {middle:.2f}x ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in FORMATS:
        sys.exit(f"expected one of {', '.join(FORMATS)}: python -m benchmarks.limits NHWC")
    main(sys.argv[1])
