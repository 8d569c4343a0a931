"""How whole models run as they are, and with each of our tools: `make bench-models`.

Every way is checked before it is timed: in float64, over some steps of training, its losses have to
be those of the model as it is.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from batchnorm.bench.conduct import say_if_busy, shown_on
from batchnorm.bench.errors import WrongResult
from batchnorm.bench.harness import alternate
from batchnorm.bench.rows import ratios, rounded
from batchnorm.bench.save import check_folder, put, save
from batchnorm.environment import describe
from batchnorm.models.compare import largest_error
from batchnorm.models.memory import kept_bytes
from benchmarks.models.networks import NETWORKS, Network, Posed, pose
from benchmarks.models.ways import (
    ACCELERATED,
    FOLDED,
    INFERENCE,
    MODES,
    SAVING,
    STOCK,
    TRAINING,
    WAYS,
    Inference,
    Training,
    Way,
)

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- models table: written by `make bench-models` -->", "<!-- end of models table -->"
FIGURES = "<!-- figures: written by `make bench-models` -->", "<!-- end of figures -->"
#: Steps of training in which the losses are compared, in float64 and in float32.
CHECKED, COMPARED = 2, 20
_EXACT = 1e-7


@dataclass(frozen=True)
class Row:
    """A way to run a network, in training or inference.

    Attributes:
        network: What it is called.
        layout: NHWC or NCHW.
        mode: training or inference.
        way: What is done with the model.
        batch: Number of images.
        image: Their height and width.
        q25_ms: The time of a step, in milliseconds: the first quartile.
        median_ms: The median.
        q75_ms: The third quartile.
        ratio: How many times the speed of the model as it is, in the same round: the median.
        ratio_q25: The first quartile.
        ratio_q75: The third one.
        kept_mb: What autograd keeps for the backward pass; nothing in inference.
        kept: The same relative to the model as it is.
        peak_mb: How much more memory the process has at most in a step than before it.
        peak: The same relative to the model as it is.
        exact: The largest relative difference of the losses over some steps, or of the logits, in
            float64, from those of the model as it is.
        apart: The same of the losses over 20 steps in float32, where rounding grows.
        rounds: How often it was timed.
    """

    network: str
    layout: str
    mode: str
    way: str
    batch: int
    image: int
    q25_ms: float
    median_ms: float
    q75_ms: float
    ratio: float
    ratio_q25: float
    ratio_q75: float
    kept_mb: float | None
    kept: float | None
    peak_mb: float | None
    peak: float | None
    exact: float
    apart: float | None
    rounds: int


def ways_of(mode: str) -> list[Way]:
    """Return the ways there are, the model as it is first."""
    return [way for way in WAYS if mode in way.modes]


def exactness(posed: Posed, mode: str) -> dict[str, float]:
    """Return how far each way is from the model as it is, in float64, where nothing is rounded.

    Args:
        posed: The network; of its images four are taken.
        mode: What is computed.

    Raises:
        WrongResult: One of them computes something else.
    """
    doubled = [copy.deepcopy(m).double() for m in (posed.training, posed.inference)]
    few = posed._replace(
        training=doubled[0],
        inference=doubled[1],
        images=posed.images[:4].double(),
        labels=posed.labels[:4],
    )
    found: dict[str, float] = {}
    expected: list[Any] = []
    for way in ways_of(mode):
        if mode == TRAINING:
            step = Training(way, few)
            for _ in range(CHECKED):
                step()
            results: list[Any] = [torch.tensor(step.losses, dtype=torch.float64)]
        else:
            results = [Inference(way, few)()]
        expected = expected or results
        found[way.name] = largest_error(expected, results)
        if not found[way.name] <= _EXACT:
            raise WrongResult(
                f"{way.name} is wrong: in {mode} of {posed.network.title} it is off by "
                f"{found[way.name]:.2g} in float64; no time is taken of it"
            )
    return found


def measured(posed: Posed, mode: str, rounds: int, peaks: dict[str, float]) -> Iterator[Row]:
    """Yield a row for each way to run a network.

    Args:
        posed: The network.
        mode: What is timed.
        rounds: How often.
        peaks: The peak memory of each way, in MB, where it was measured.
    """
    exact = exactness(posed, mode)
    kept: dict[str, float] = {}
    calls: dict[str, Callable[[], object]] = {}
    for way in ways_of(mode):
        if mode == TRAINING:
            step = Training(way, posed)
            there = [*step.model.parameters(), *step.model.buffers(), step.images]
            loss = step.loss()
            kept[way.name] = kept_bytes(loss, exclude=there) / 1e6
            del loss
            step()  # what is done once is done
            calls[way.name] = step
        else:
            calls[way.name] = Inference(way, posed)
            calls[way.name]()
    times = alternate(calls, 0, rounds)
    for way in ways_of(mode):
        step_of: Any = calls[way.name]
        low, middle, high = (rounded(t * 1e3) for t in quantiles(times[way.name], n=4))
        ratio_low, ratio, ratio_high = map(rounded, ratios(times[STOCK.name], times[way.name]))
        apart = None
        if mode == TRAINING:
            stock: Any = calls[STOCK.name]
            pairs = zip(step_of.losses[:COMPARED], stock.losses[:COMPARED], strict=True)
            apart = rounded(max(abs(a / b - 1) for a, b in pairs), 2)
        own, base = (peaks.get(name) for name in (way.name, STOCK.name))
        yield Row(
            network=posed.network.title,
            layout=posed.layout,
            mode=mode,
            way=way.name,
            batch=posed.network.batch,
            image=posed.network.image,
            q25_ms=low,
            median_ms=middle,
            q75_ms=high,
            ratio=ratio,
            ratio_q25=ratio_low,
            ratio_q75=ratio_high,
            kept_mb=rounded(kept[way.name]) if way.name in kept else None,
            kept=rounded(kept[way.name] / kept[STOCK.name]) if way.name in kept else None,
            peak_mb=None if own is None else rounded(own),
            peak=rounded(own / base) if own and base else None,
            exact=rounded(exact[way.name], 2),
            apart=apart,
            rounds=rounds,
        )


def peak_of(network: str, layout: str, way: str, quick: bool) -> float:
    """Return by how many MB the memory of a process of its own grows in a step of training.

    Args:
        network: Its name.
        layout: The order of dimensions.
        way: How it is run.
        quick: Whether the network is small.
    """
    task = json.dumps([network, layout, way, quick])
    command = [sys.executable, "-m", "benchmarks.whole", "--peak", task]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return float(done.stdout.split()[-1])


def _peak(network: str, layout: str, way: str, quick: bool) -> float:
    """Return what `peak_of` does, of this process: by the high-water mark that Linux keeps."""
    found = NETWORKS[network].quick() if quick else NETWORKS[network]
    step = Training(next(w for w in WAYS if w.name == way), pose(found, layout))
    step()  # captured, and with gradients
    status, before = Path("/proc/self/status"), 0.0
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        before = _mark(status, "VmRSS")
        step()
    return _mark(status, "VmHWM") - before


def _mark(status: Path, name: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of README.md.

    Args:
        rows: All that was measured.
    """
    lines = [
        "| model | mode | way | ms | speed | kept | peak | losses apart |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        known = [f"{v:.2f}" if v is not None else "" for v in (row.kept, row.peak)]
        apart = "" if row.apart is None else f"{row.apart:.0e}"
        lines.append(
            f"| {row.network}, {row.layout} | {row.mode} | {row.way} | {row.median_ms:.0f} | "
            f"{row.ratio:.2f}x | {' | '.join(known)} | {apart} |"
        )
    return "\n".join(lines)


def figures(rows: Sequence[Row]) -> str:
    """Return the table of what was to be reached, and was.

    Args:
        rows: All that was measured; the first network counts.
    """
    first = rows[0].network
    lines = ["| | must be | aim | " + " | ".join(layouts := _layouts(rows, first)) + " |"]
    lines.append("| --- | --- | --- |" + " ---: |" * len(layouts))
    for what, must, aim, mode, way, name in (
        ("training step, accelerated", "1.25x", "1.4x", TRAINING, ACCELERATED, "ratio"),
        ("kept activations with `save_memory`", "0.65", "0.55", TRAINING, SAVING, "kept"),
        ("training step with `save_memory`", "1x", "1.2x", TRAINING, SAVING, "ratio"),
        ("inference, folded", "1.2x", "1.3x", INFERENCE, FOLDED, "ratio"),
        ("losses over 20 steps, float32", "rounding", "", TRAINING, ACCELERATED, "apart"),
    ):
        found = {
            row.layout: getattr(row, name)
            for row in rows
            if (row.network, row.mode, row.way) == (first, mode, way.name)
        }
        cells = [f"{found[layout]:.2g}" if layout in found else "" for layout in layouts]
        unit = "x" if name == "ratio" else ""
        cells = [
            f"{found[v]:.2f}{unit}" if name != "apart" else c
            for v, c in zip(layouts, cells, strict=True)
        ]
        lines.append(f"| {what} | {must} | {aim} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _layouts(rows: Sequence[Row], network: str) -> list[str]:
    return list(dict.fromkeys(row.layout for row in rows if row.network == network))


def png(rows: Sequence[Row]) -> bytes:
    """Draw the speeds.

    Args:
        rows: All that was measured.
    """
    groups = list(dict.fromkeys((r.network, r.layout, r.mode) for r in rows))
    names = [name for name in dict.fromkeys(r.way for r in rows) if name != STOCK.name]
    figure = Figure(figsize=(7.2, 0.6 + 0.75 * len(groups)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for at, name in enumerate(names):
        own = [r for r in rows if r.way == name]
        places = [groups.index((r.network, r.layout, r.mode)) + at * height for r in own]
        errors = [[r.ratio - r.ratio_q25 for r in own], [r.ratio_q75 - r.ratio for r in own]]
        axes.barh(places, [r.ratio for r in own], height * 0.9, xerr=errors, label=name)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_yticks([g + 0.4 - height / 2 for g in range(len(groups))])
    axes.set_yticklabels([f"{n}\n{layout}, {mode}" for n, layout, mode in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times the speed of the model as it is")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", fontsize=8, frameon=False, ncols=len(names))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def conduct(
    names: Sequence[str], quick: bool, out: Path, console: Console, *, peaks: bool = True
) -> list[Row]:
    """Measure networks, and write what came of it.

    Args:
        names: Of the networks.
        quick: Whether they are small, and timed a few times.
        out: The folder of the results.
        console: Where it is shown how far it is.
        peaks: Whether peak memory is measured, each in a process of its own.
    """
    check_folder(out)
    load = say_if_busy(console)
    tasks = [
        (NETWORKS[name].quick() if quick else NETWORKS[name], name, layout)
        for name in names
        for layout in (("NHWC", "NCHW") if name == names[0] else ("NHWC",))
    ]
    rows: list[Row] = []
    with shown_on(console) as progress:
        bar = progress.add_task("", total=2 * len(tasks))
        for network, name, layout in tasks:
            progress.update(bar, description=f"{network.title}, {layout}", refresh=True)
            rows += _of(network, name, layout, quick, peaks, lambda: progress.advance(bar))
    made_on = {**describe(), "load": round(load, 2), "quick": quick}
    save(out, rows, made_on, png(rows), "models")
    console.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)
    return rows


def _of(
    network: Network,
    name: str,
    layout: str,
    quick: bool,
    peaks: bool,
    advance: Callable[[], None],
) -> Iterator[Row]:
    posed, high = pose(network, layout), {}
    if peaks and layout == "NHWC":
        high = {w.name: peak_of(name, layout, w.name, quick) for w in (STOCK, ACCELERATED, SAVING)}
    for mode in MODES:
        rounds = COMPARED if mode == TRAINING else 15
        if quick:
            rounds = 3
        yield from measured(posed, mode, rounds, high if mode == TRAINING else {})
        advance()


def main() -> None:
    """Measure, and write the tables of README.md and docs/bench.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small networks, within a minute")
    parser.add_argument("--models", default=",".join(NETWORKS), help="by default %(default)s")
    parser.add_argument("--out", type=Path, help="another folder; README.md is left alone then")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(_peak(*json.loads(given.peak)))
        return
    names = given.models.split(",")
    if unknown := set(names) - NETWORKS.keys():
        parser.error(f"--models has {', '.join(unknown)}: expected some of {', '.join(NETWORKS)}")
    whole = given.out is None and not given.quick
    out = given.out or ROOT / ("benchmarks/results" if whole else "bench")
    rows = conduct(names, given.quick, out, Console())
    if whole:
        picture = "![Times the speed of the models as they are](benchmarks/results/models.png)"
        put(ROOT / "README.md", BEGIN, f"{markdown(rows)}\n\n{picture}", END)
        put(ROOT / "docs" / "bench.md", FIGURES[0], figures(rows), FIGURES[1])


if __name__ == "__main__":
    main()
