"""What a small batch costs beside the kernels: `python -m benchmarks.seam`.

An autograd node in Python that does nothing, with the inputs and outputs of our layer's, is timed
beside the layer and beside `torch.nn`, forward and backward. No layer whose node is in Python can
be faster than that.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.harness import alternate

SHAPE = (32, 128)


class Nothing(torch.autograd.Function):
    """A node that returns new memory, and gradients that were there before."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: None, results: list[Tensor]
    ) -> Tensor:
        """Return a new tensor."""
        ctx.results = results
        ctx.save_for_backward(x, weight, bias, residual)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients that are there already."""
        _ = ctx.saved_tensors
        return *ctx.results, None, None


def main(seconds: float = 3.0) -> dict[str, float]:
    """Print the times in microseconds, and return them.

    Args:
        seconds: How long all are timed together.
    """
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    stock = nn.Sequential(nn.BatchNorm1d(SHAPE[1]), nn.ReLU(inplace=True))
    ours = bn.BatchNorm1d(SHAPE[1], activation="relu")
    inputs = [x, ours.weight, ours.bias]
    results = [torch.zeros_like(v) for v in inputs]

    # as the layer calls its own, without looking for transforms
    apply: Any = super(torch.autograd.Function, Nothing).apply

    calls: dict[str, Callable[[], object]] = {
        "torch.nn": lambda: torch.autograd.grad(stock(x), [x, *stock.parameters()], dy),
        "batchnorm": lambda: torch.autograd.grad(ours(x), inputs, dy),
        "a node that does nothing": lambda: torch.autograd.grad(
            apply(*inputs, None, results), inputs, dy
        ),
    }
    for call in calls.values():
        call()
    times = {name: median(t) * 1e6 for name, t in alternate(calls, seconds).items()}
    table = Table(title=f"BN + ReLU, forward and backward, {SHAPE}")
    table.add_column("")
    table.add_column("us", justify="right")
    for name, microseconds in times.items():
        table.add_row(name, f"{microseconds:.0f}")
    Console().print(table)
    return times


if __name__ == "__main__":
    main()
