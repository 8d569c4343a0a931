"""How much less time bfloat16 takes than float32: `python -m benchmarks.halves`.

There is half as much memory to move and more to do for each value, so it depends on where the
values lie. The kernels alone, BN + ReLU, write into memory that is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from batchnorm.bench.harness import alternate
from batchnorm.kernels import Activation, Form, Given, native

#: Where x, dy, y and dx lie in both types, and what they are.
SHAPES = {
    "first cache": (32, 64),
    "second cache": (1024, 64),
    "memory, runs": (32, 64, 112, 112),
    "memory, rows of 64": (401408, 64),
    "memory, rows of 4096": (4096, 4096),
}


def kernels(x: Tensor, dy: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the calls that normalize x and differentiate by it.

    Args:
        x: The batch.
        dy: The gradient of y.
    """
    form = Form(activation=Activation.parse("relu"))
    weight, bias = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    batch = native._seen(x, form)
    y, dx = native.output_like(x, batch), native.output_like(x, batch)
    mean, inverse_std, m2 = (torch.empty_like(weight, dtype=torch.float64) for _ in range(3))
    sums = torch.empty_like(weight), torch.empty_like(bias)
    given = Given(x, mean, inverse_std, weight, bias, None, None, form)
    counts = [x.numel() / len(weight)]
    statistics = mean, inverse_std, m2

    def forward() -> None:
        native._forward(batch, x, y, weight, bias, None, None, statistics, None)

    def backward() -> None:
        native._backward(batch, dy, given, dx, None, None, counts, True, *sums)

    forward()
    return forward, backward


def main(seconds: float = 2.0) -> dict[str, tuple[float, float]]:
    """Print the time in bfloat16 as a part of that in float32, on one thread, and return it.

    Args:
        seconds: How long each shape is timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = {}
    table = Table(title="time in bfloat16 / time in float32, one thread")
    for title in ("where", "shape", "forward", "backward"):
        table.add_column(title, justify="right" if "ward" in title else "left")
    for where, shape in SHAPES.items():
        x, dy = torch.randn(shape), torch.randn(shape)
        calls: dict[str, Callable[[], object]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            both = kernels(x.to(dtype), dy.to(dtype))
            calls |= {f"{dtype} {i}": call for i, call in enumerate(both)}
        times = {name: median(t) for name, t in alternate(calls, seconds).items()}
        one, other = (times[f"torch.bfloat16 {i}"] / times[f"torch.float32 {i}"] for i in (0, 1))
        ratios[where] = one, other
        table.add_row(where, "x".join(map(str, shape)), f"{one:.2f}", f"{other:.2f}")
    torch.set_num_threads(threads)
    Console().print(table)
    return ratios


if __name__ == "__main__":
    main()
