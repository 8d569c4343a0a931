"""Time the layer beside its peers: `make bench`, or `batchnorm bench`.

Each case is checked against float64 first; no time is taken of a wrong result. The table and a
picture are written to benchmarks/results, with the hardware and the versions, and its summary into
README.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

import batchnorm as bn
from benchmarks.harness import RESULTS, Row, alternate, rows, save, show

SHAPES = (
    (32, 64, 112, 112), (32, 256, 56, 56), (128, 64, 32, 32), (32, 2048, 7, 7), (8, 3, 224, 224),
    (1, 64, 256, 256), (4096, 4096), (256, 1024), (64, 512), (32, 128),
)  # fmt: skip
PEER = "torch.nn"
OURS = "native"
BOTH = "forward + backward"
#: Largest error allowed, in the Euclidean norm, relative to the result.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
#: How often a batch must cross the memory bus at least, in each mode.
PASSES = {"inference": 2, "forward": 2, BOTH: 5}
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- bench table: written by `make bench` -->", "<!-- end of bench table -->"

Step = Callable[[], object]


class Forced(nn.Module):
    """Our layer on one backend."""

    def __init__(self, layer: nn.Module, backend: str) -> None:
        super().__init__()
        self.layer, self.backend = layer, backend

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        with bn.backend(self.backend):
            result: Tensor = self.layer(x)
        return result


def layers(channels: int, images: bool, relu: bool, peers: bool) -> dict[str, nn.Module]:
    """Return the layers to compare, each as its users write it; `peers`: also the slow to build."""
    stock: nn.Module = nn.BatchNorm2d(channels) if images else nn.BatchNorm1d(channels)
    ours: type[bn.BatchNorm] = bn.BatchNorm2d if images else bn.BatchNorm1d
    if relu:
        stock = nn.Sequential(stock, nn.ReLU(inplace=True))
    activation = "relu" if relu else None
    found = {PEER: stock}
    if bn.backends()[0].available() is None:
        found[OURS] = ours(channels, activation=activation)
    found["eager"] = Forced(ours(channels, activation=activation), "eager")
    if peers:
        torch.compiler.reset()
        compiled = copy.deepcopy(stock)
        compiled.compile()
        found["torch.compile"] = compiled
    return found


def cases() -> Iterator[Row]:
    """Yield what is measured: every shape, layout, type, mode, with and without ReLU."""
    for shape in SHAPES:
        for layout in ("NCHW", "NHWC") if len(shape) == 4 else ("NC",):
            for dtype in (torch.float32, torch.bfloat16):
                for mode in PASSES:
                    for relu in (False, True):
                        yield {
                            "shape": "x".join(map(str, shape)),
                            "layout": layout,
                            "dtype": str(dtype).removeprefix("torch."),
                            "mode": mode,
                            "relu": relu,
                            "mb": round(math.prod(shape) * dtype.itemsize / 1e6, 2),
                        }


def copy_speed() -> float:
    """Return how many bytes a large copy reads and writes in a microsecond, into mapped memory."""
    source = torch.zeros(2**25)
    target = torch.ones(2**25)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / sorted(times)[4] / 1e6


def jax_step(x: Tensor, dy: Tensor, channel_dim: int) -> Callable[[], object] | None:
    """Return a jitted step of BN + ReLU in JAX, or None where JAX is not installed."""
    if importlib.util.find_spec("jax") is None:
        return None
    import jax
    import jax.numpy as jnp

    axes = tuple(d for d in range(x.ndim) if d != channel_dim)

    def layer(x, weight, bias):  # type: ignore[no-untyped-def]
        shape = [1] * x.ndim
        shape[channel_dim] = -1
        mean = jnp.mean(x, axes, keepdims=True)
        var = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
        xhat = (x - mean) * jax.lax.rsqrt(var + 1e-5)
        return jax.nn.relu(xhat * weight.reshape(shape) + bias.reshape(shape))

    def both(x, dy, weight, bias):  # type: ignore[no-untyped-def]
        y, pull = jax.vjp(layer, x, weight, bias)
        return y, pull(dy)

    compiled = jax.jit(both)
    channels = x.shape[channel_dim]
    arguments = [jnp.asarray(v.numpy()) for v in (x, dy)]
    arguments += [jnp.ones(channels), jnp.zeros(channels)]
    return lambda: jax.block_until_ready(compiled(*arguments))


def measure(case: Row, budget_s: float, speed: float, compiled: bool) -> list[Row]:
    """Check the layers of one case, then time them in turn."""
    shape = tuple(map(int, case["shape"].split("x")))
    dtype = getattr(torch, case["dtype"])
    last = torch.channels_last if case["layout"] == "NHWC" else torch.contiguous_format
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=last) for _ in range(2))
    backward = case["mode"] == BOTH
    peers = compiled and backward and case["relu"] and dtype == torch.float32 and case["mb"] >= 16
    modules = layers(shape[1], len(shape) == 4, case["relu"], peers)
    for module in modules.values():
        module.train(case["mode"] != "inference")
    check(modules, x, dy, backward)
    calls = {name: step(module, x, dy, backward) for name, module in modules.items()}
    if peers:
        ordered = (
            (x, dy) if last == torch.contiguous_format else (x.movedim(1, -1), dy.movedim(1, -1))
        )
        jitted = jax_step(*ordered, 1 if last == torch.contiguous_format else len(shape) - 1)
        if jitted is not None:
            calls["jax"] = jitted
    measured = list(rows(case, alternate(calls, budget_s), PEER))
    for row in measured:
        least = PASSES[case["mode"]] * x.nbytes / speed
        row["fraction_of_copy_speed"] = round(least / row["median_us"], 3)
    return measured


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
    modules = {name: module for name, module in modules.items() if name != "torch.compile"}
    expected = results(truth, x.double(), dy.double(), backward)
    for name, module in modules.items():
        found = results(copy.deepcopy(module), x, dy, backward)
        for actual, wanted in zip(found, expected, strict=True):
            # of the whole, for a single value on the kink of ReLU may fall to either side
            error = float((actual.double() - wanted).norm() / wanted.norm())
            if not error < TOLERANCES[x.dtype]:
                raise AssertionError(f"{name} is wrong by {error:g} for {tuple(x.shape)}")


def results(module: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> list[Tensor]:
    """Return the output, and the input's gradient where there is a backward pass."""
    leaf = x.detach().requires_grad_(backward)
    y = module(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy)] if backward else [y.detach()]


def mean_ratio(measured: list[Row], **wanted: object) -> float:
    """Return the geometric mean of the speed against the peer, over the rows that are wanted."""
    found = [
        row[f"speed_against_{PEER}"]
        for row in measured
        if all(row[key] == value for key, value in wanted.items())
    ]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else math.nan


def summary(measured: list[Row], speed: float) -> str:
    """Return the table of README.md: BN + ReLU, forward and backward, float32."""
    names = [OURS, "eager", "torch.compile", "jax"]
    chosen = [r for r in measured if r["mode"] == BOTH and r["relu"] and r["dtype"] == "float32"]
    found = {(r["shape"], r["layout"], r["implementation"]): r for r in chosen}
    present = [n for n in names if any(r["implementation"] == n for r in chosen)]
    lines = [
        "| shape | layout | MB | `torch.nn`, ms | " + " | ".join(f"`{n}`" for n in present)
        + " | of copy speed |",
        "| --- | --- " + "| ---: " * (len(present) + 3) + "|",
    ]  # fmt: skip
    for shape, layout, name in found:
        if name != PEER:
            continue
        peer = found[shape, layout, PEER]
        ratios = [found.get((shape, layout, n)) for n in present]
        cells = [f"{r[f'speed_against_{PEER}']:.1f}x" if r else "" for r in ratios]
        own = found.get((shape, layout, OURS), peer)["fraction_of_copy_speed"]
        lines.append(
            f"| {shape} | {layout} | {peer['mb']:g} | {peer['median_us'] / 1e3:.2f} | "
            + " | ".join(cells)
            + f" | {own:.0%} |"
        )
    large = [r for r in chosen if r["mb"] >= 16]
    middle = [r for r in chosen if 1 <= r["mb"] < 16]
    lines += [
        "",
        f"Geometric means of `native`: {mean_ratio(large, implementation=OURS):.1f}x over 16 MB, "
        f"{mean_ratio(middle, implementation=OURS):.1f}x from 1 to 16 MB. A large copy ran at "
        f"{speed / 1e3:.1f} GB/s, read and written; the last column is what share of that speed "
        "five passes over the batch would need in `native`'s time.",
    ]
    return "\n".join(lines)


def draw(measured: list[Row], name: str) -> None:
    """Draw the speed against the peer by size, for forward + backward."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
        for layouts, color in ((("NCHW",), "C0"), (("NHWC", "NC"), "C1")):
            points = [
                (row["mb"], row[f"speed_against_{PEER}"])
                for row in measured
                if row["implementation"] == OURS and row["mode"] == BOTH and row["relu"]
                if row["dtype"] == dtype and row["layout"] in layouts
            ]
            label = f"{dtype}, {' and '.join(layouts)}"
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, color=color, label=label)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="size of the batch, MB")
    axes.set_ylabel(f"times the speed of {PEER}")
    axes.set_title("BN + ReLU, forward + backward")
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close(figure)


def write_readme(table: str) -> None:
    """Put the table between its markers in README.md."""
    text = README.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    README.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text), encoding="utf-8")


def main() -> None:
    """Measure all cases, print them, write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each case")
    parser.add_argument("--quick", action="store_true", help="only what the table of README has")
    parser.add_argument("--only-torch", action="store_true", help="no compiled peers, no JAX")
    parser.add_argument("--threads", type=int, help="number of threads; all if left out")
    parser.add_argument("--output", default="cpu", help="name of the files in benchmarks/results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if importlib.util.find_spec("jax") is None:
        print("JAX is not installed (the extra `bench` has it): it is left out")
    speed = copy_speed()
    chosen = [
        case
        for case in cases()
        if not arguments.quick
        or (case["mode"] == BOTH and case["relu"] and case["dtype"] == "float32")
    ]
    measured = [
        row
        for case in track(chosen, description="measuring", transient=True)
        for row in measure(case, arguments.seconds, speed, not arguments.only_torch)
    ]
    save(arguments.output, measured)
    draw(measured, arguments.output)
    ratio = f"speed_against_{PEER}"
    columns = ["shape", "layout", "dtype", "mode", "relu", "implementation", "median_us", ratio]
    show(
        f"a ratio over 1 is faster than {PEER}; a copy runs at {speed / 1e3:.1f} GB/s",
        [row for row in measured if row["implementation"] != PEER],
        [*columns, "fraction_of_copy_speed"],
    )
    table = summary(measured, speed)
    print(table)
    if arguments.output == "cpu":
        write_readme(table)


if __name__ == "__main__":
    main()
