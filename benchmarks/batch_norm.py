"""Time the layer beside `torch.nn`: `make bench`.

Each case is checked against float64 first; no time is taken of a wrong result. The table is written
to benchmarks/results, with the hardware and the versions.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator

import torch
from rich.progress import track
from torch import Tensor, nn

import batchnorm as bn
from benchmarks.harness import Row, alternate, rows, save, show

SHAPES = (
    (32, 64, 112, 112), (32, 256, 56, 56), (128, 64, 32, 32), (32, 2048, 7, 7), (8, 3, 224, 224),
    (1, 64, 256, 256), (4096, 4096), (256, 1024), (64, 512), (32, 128),
)  # fmt: skip
PEER = "torch.nn"
#: Largest error allowed, relative to the largest value.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}

Step = Callable[[], object]


def layers(channels: int, images: bool, relu: bool) -> dict[str, nn.Module]:
    """Return the layers to compare, each as its users write it."""
    stock: nn.Module = nn.BatchNorm2d(channels) if images else nn.BatchNorm1d(channels)
    ours: type[bn.BatchNorm] = bn.BatchNorm2d if images else bn.BatchNorm1d
    if relu:
        stock = nn.Sequential(stock, nn.ReLU(inplace=True))
    return {PEER: stock, "batchnorm": ours(channels, activation="relu" if relu else None)}


def cases() -> Iterator[Row]:
    """Yield what is measured: every shape, layout, type, mode, with and without ReLU."""
    for shape in SHAPES:
        for layout in ("NCHW", "NHWC") if len(shape) == 4 else ("NC",):
            for dtype in (torch.float32, torch.bfloat16):
                for mode in ("inference", "forward", "forward + backward"):
                    for relu in (False, True):
                        yield {
                            "shape": "x".join(map(str, shape)),
                            "layout": layout,
                            "dtype": str(dtype).removeprefix("torch."),
                            "mode": mode,
                            "relu": relu,
                        }


def measure(case: Row, budget_s: float) -> list[Row]:
    """Check the layers of one case, then time them in turn."""
    shape = tuple(map(int, case["shape"].split("x")))
    dtype = getattr(torch, case["dtype"])
    last = torch.channels_last if case["layout"] == "NHWC" else torch.contiguous_format
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=last) for _ in range(2))
    modules = layers(shape[1], len(shape) == 4, case["relu"])
    for module in modules.values():
        module.train(case["mode"] != "inference")
    backward = case["mode"] == "forward + backward"
    check(modules, x, dy, backward)
    calls = {name: step(module, x, dy, backward) for name, module in modules.items()}
    return list(rows(case, alternate(calls, budget_s), PEER))


def step(module: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> Step:
    """Return one call to time."""
    if not backward:
        return torch.no_grad()(lambda: module(x))
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *module.parameters()]
    return lambda: torch.autograd.grad(module(leaf), inputs, dy)


def check(modules: dict[str, nn.Module], x: Tensor, dy: Tensor, backward: bool) -> None:
    """Raise unless every layer gives what `torch.nn` gives in float64."""
    truth = copy.deepcopy(modules[PEER]).double()
    expected = results(truth, x.double(), dy.double(), backward)
    for name, module in modules.items():
        found = results(copy.deepcopy(module), x, dy, backward)
        for actual, wanted in zip(found, expected, strict=True):
            error = float((actual.double() - wanted).abs().max() / wanted.abs().max())
            if not error < TOLERANCES[x.dtype]:
                raise AssertionError(f"{name} is wrong by {error:g} for {tuple(x.shape)}")


def results(module: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> list[Tensor]:
    """Return the output, and the input's gradient where there is a backward pass."""
    leaf = x.detach().requires_grad_(backward)
    y = module(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy)] if backward else [y.detach()]


def main() -> None:
    """Measure all cases, print them, write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each case")
    parser.add_argument("--output", default="cpu", help="name of the files in benchmarks/results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    measured = [
        row
        for case in track(list(cases()), description="measuring", transient=True)
        for row in measure(case, arguments.seconds)
    ]
    save(arguments.output, measured)
    ratio = f"speed_against_{PEER}"
    ours = [row for row in measured if row["implementation"] != PEER]
    show(
        "batchnorm beside torch.nn; a ratio over 1 is faster",
        ours,
        ["shape", "layout", "dtype", "mode", "relu", "median_us", ratio],
    )
    mean = math.exp(sum(math.log(row[ratio]) for row in ours) / len(ours))
    print(f"geometric mean of the ratios: {mean:.2f}")


if __name__ == "__main__":
    main()
