"""What is measured of a network: each way is checked, then timed in turn with the others."""

from __future__ import annotations

import copy
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from batchnorm.bench.errors import WrongResult
from batchnorm.bench.harness import alternate
from batchnorm.bench.rows import ratios, rounded
from batchnorm.models.compare import largest_error
from batchnorm.models.memory import kept_bytes
from benchmarks.models.networks import NETWORKS, Posed, pose
from benchmarks.models.ways import BY_NAME, STOCK, TRAINING, WAYS, Inference, Training, Way

ROOT = Path(__file__).parents[2]
#: Steps of training in which the losses are compared, in float64 and in float32.
CHECKED, COMPARED = 2, 20
_EXACT, _CLOSE = 1e-7, 1e-2


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
        peak_mb: How much more memory the process has at most in a step than before the first.
        peak: The same relative to the model as it is.
        exact: The largest relative difference of the losses of two steps, or of the logits, in
            float64, from those of the model as it is; not of other compilers.
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
    exact: float | None
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
    for way in (way for way in ways_of(mode) if way.is_ours):
        if mode == TRAINING:
            step = Training(way, few)
            for _ in range(CHECKED):
                step()
            results: list[Any] = [torch.tensor(step.losses, dtype=torch.float64)]
        else:
            results = [Inference(way, few)()]
        expected = expected or results
        found[way.name] = largest_error(expected, results)
        _check(way, found[way.name], _EXACT, few, mode)
    return found


def _check(way: Way, error: float, most: float, posed: Posed, mode: str) -> None:
    """Raise WrongResult unless an error is small enough."""
    if not error <= most:
        dtype = str(posed.images.dtype).removeprefix("torch.")
        raise WrongResult(
            f"{way.name} is wrong: in {mode} of {posed.network.title} it is off by {error:.2g} in "
            f"{dtype}; no time is taken of it"
        )


def measured(posed: Posed, mode: str, rounds: int, peaks: dict[str, float]) -> Iterator[Row]:
    """Yield a row for each way to run a network.

    Args:
        posed: The network.
        mode: What is timed.
        rounds: How often.
        peaks: The peak memory of each way, in MB, where it was measured.
    """
    exact = exactness(posed, mode)
    torch._dynamo.reset()  # or else sizes seem to change, and are compiled as such
    kept: dict[str, float] = {}
    calls: dict[str, Callable[[], object]] = {}
    expected: list[Any] = []
    for way in ways_of(mode):
        if mode == TRAINING:
            calls[way.name] = step = Training(way, posed)
            there = [*step.model.parameters(), *step.model.buffers(), step.images]
            loss = step.loss()
            kept[way.name], result = kept_bytes(loss, exclude=there) / 1e6, loss.detach()
            del loss
        else:
            calls[way.name] = inference = Inference(way, posed)
            result = inference()
        expected = expected or [result]
        _check(way, largest_error(expected, [result]), _CLOSE, posed, mode)
        calls[way.name]()  # what is done once is done
    times = alternate(calls, 0, rounds, settled=True)
    base = STOCK.name
    for way in ways_of(mode):
        step_of: Any = calls[way.name]
        stock: Any = calls[base]
        low, middle, high = (rounded(t * 1e3) for t in quantiles(times[way.name], n=4))
        ratio_low, ratio, ratio_high = map(rounded, ratios(times[base], times[way.name]))
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
            kept_mb=_known(kept, way.name),
            kept=_known(kept, way.name, base),
            peak_mb=_known(peaks, way.name),
            peak=_known(peaks, way.name, base),
            exact=rounded(exact[way.name], 2) if way.is_ours else None,
            apart=_apart(step_of.losses, stock.losses) if mode == TRAINING else None,
            rounds=rounds,
        )


def _known(values: dict[str, float], name: str, base: str | None = None) -> float | None:
    """Return a value, relative to another, if it is known."""
    if name not in values:
        return None
    return rounded(values[name] / (1 if base is None else values[base]))


def _apart(losses: list[float], expected: list[float]) -> float:
    pairs = zip(losses[:COMPARED], expected[:COMPARED], strict=True)
    return rounded(max(abs(a / b - 1) for a, b in pairs), 2)


def peak_of(network: str, layout: str, way: str, quick: bool) -> float:
    """Return how much memory the steps of training take at most, in MB, in a process of its own.

    That is over what the process has before the first: the model, the images, and what is loaded.

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


def own_peak(network: str, layout: str, way: str, quick: bool) -> float:
    """Return what `peak_of` does, of this process: by the high-water mark that Linux keeps."""
    found = NETWORKS[network].quick() if quick else NETWORKS[network]
    step = Training(BY_NAME[way], pose(found, layout))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there: of glibc
    before = _mark("VmRSS")
    step()  # captured or compiled, which takes memory, too
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step()
    return _mark("VmHWM") - before


def _mark(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) / 1e3
