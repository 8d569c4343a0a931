"""Draw the pictures of the guides to shift, check and monitor: `make readme`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import batchnorm as bn
from batchnorm.study.data import load
from batchnorm.study.descent import batches, some
from batchnorm.study.networks import NETWORKS, build
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.shifts import shift

PICTURES = Path(__file__).parent / "images"
STEPS = 200


def main() -> None:
    """Train a network on digits, look at it, shift its inputs, and spoil its statistics."""
    data = load("digits")
    network = NETWORKS["conv"]
    model = build(network, NORMALIZED, data.shape, data.classes, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=network.usual_rate)
    with bn.Monitor(model, every=5) as monitor:
        for _, (x, y) in zip(range(STEPS), batches(data, 60, 0, torch.float32), strict=False):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    monitor.plot().savefig(PICTURES / "monitor.png", dpi=110)

    model.eval()
    inputs, _ = some(data.test_inputs, data.test_labels, torch.float32)
    blurred = torch.from_numpy(shift(inputs.numpy(), "blur", 2, low=0, high=16))
    bn.measure_shift(model, torch.split(blurred, 60)).plot().savefig(
        PICTURES / "shift.png", dpi=110
    )

    _spoil(model)
    bn.check(model, torch.split(inputs, 60)).plot().savefig(PICTURES / "check.png", dpi=110)


@torch.no_grad()
def _spoil(model: nn.Module) -> None:
    """Let one layer have the statistics of other data, as weights do that were averaged."""
    second = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)][1]
    second.get_buffer("running_mean").add_(3)


if __name__ == "__main__":
    main()
