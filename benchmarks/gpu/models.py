"""Whole training steps on a device: ResNet-50 as it is, with our tools, and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import torch
from torch import Tensor

from batchnorm.bench.errors import WrongResult
from batchnorm.bench.rows import ratios, rounded
from benchmarks.gpu.clock import Timed, alternate
from benchmarks.gpu.layers import free, said
from benchmarks.models.measure import _CLOSE, _EXACT, CHECKED, Row, _apart, _known
from benchmarks.models.networks import FORMATS, NETWORKS, Network, Posed
from benchmarks.models.ways import (
    ACCELERATED,
    COMPILED,
    CONVERTED,
    REORDERED,
    SAVING,
    STOCK,
    TRAINING,
    Training,
    Way,
)

WAYS = (STOCK, REORDERED, CONVERTED, ACCELERATED, SAVING, COMPILED)
#: Numbers of images: the next is taken where the memory does not suffice.
BATCHES = (256, 128, 64)
LAYOUT = "NHWC"
#: Steps in which the peak of memory is looked for.
_WATCHED = 2


@dataclass
class Outcome:
    """What came of the models.

    Attributes:
        rows: One for each way that was timed.
        failed: Which were not, and why.
        too_large: For which batches there was too little memory.
    """

    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    too_large: dict[str, str] = field(default_factory=dict)


class Autocast(Training):
    """A training step whose forward pass and loss are under autocast to bfloat16."""

    def loss(self) -> Tensor:
        """Return the loss, before its backward pass."""
        with torch.autocast(self.images.device.type, torch.bfloat16):
            return super().loss()


def pose(network: Network, device: torch.device) -> Posed:
    """Draw the weights, the images and the labels of a network, the same ones each time.

    Args:
        network: The network.
        device: Where the numbers are.
    """
    form = FORMATS[LAYOUT]
    model = network.make().to(device=device, memory_format=form)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    size = (network.batch, 3, network.image, network.image)
    images = torch.randn(size, generator=generator).to(device).contiguous(memory_format=form)
    labels = torch.randint(network.settings["num_labels"], size[:1], generator=generator)
    return Posed(network, LAYOUT, model, model, images, labels.to(device))


def measure(
    ways: Sequence[Way],
    device: torch.device,
    rounds: int,
    quick: bool,
    is_over: Callable[[], bool],
) -> Outcome:
    """Check and time the training steps, with as many images as there is memory for.

    Args:
        ways: The ways to run the network, the model as it is first.
        device: Where.
        rounds: How often each is timed.
        quick: Whether the network is small.
        is_over: Returns whether no other way is to be begun any more.
    """
    network, too_large = NETWORKS["resnet50"], {}
    sizes = [network.quick()] if quick else [network.with_images(n, 224) for n in BATCHES]
    for chosen in sizes:
        try:
            outcome = _measure(ways, pose(chosen, device), rounds, is_over)
        except torch.OutOfMemoryError as error:
            too_large[f"{chosen.batch} images"] = said(error)
        else:
            outcome.too_large = too_large
            return outcome
        finally:
            torch.compiler.reset()
            free(device)
    return Outcome(failed=too_large)


def _measure(
    ways: Sequence[Way], posed: Posed, rounds: int, is_over: Callable[[], bool]
) -> Outcome:
    outcome = Outcome()
    device = posed.images.device
    exact = _exactness(ways, posed, outcome)
    torch.compiler.reset()  # or else sizes seem to change, and are compiled as such
    steps: dict[str, Autocast] = {}
    peaks: dict[str, float] = {}
    for way in ways:
        if way.name in outcome.failed or (steps and is_over()):
            continue
        free(device)
        try:
            step, peak = _prepared(way, posed)
            _check(way, step.losses[0], steps.get(STOCK.name, step).losses[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the others are measured yet
            if way is STOCK:
                raise
            outcome.failed[way.name] = said(error)
            continue
        steps[way.name] = step
        if peak is not None:
            peaks[way.name] = peak
    calls = {name: Timed([step]) for name, step in steps.items()}
    times = alternate(calls, device, 0, rounds, settled=True)
    base = STOCK.name
    for name, step in steps.items():
        low, middle, high = (rounded(t * 1e3) for t in quantiles(times[name], n=4))
        ratio_low, ratio, ratio_high = map(rounded, ratios(times[base], times[name]))
        row = Row(
            network=posed.network.title,
            layout=posed.layout,
            mode=TRAINING,
            way=name,
            batch=posed.network.batch,
            image=posed.network.image,
            q25_ms=low,
            median_ms=middle,
            q75_ms=high,
            ratio=ratio,
            ratio_q25=ratio_low,
            ratio_q75=ratio_high,
            kept_mb=None,
            kept=None,
            peak_mb=_known(peaks, name),
            peak=_known(peaks, name, base),
            exact=rounded(exact[name], 2) if name in exact else None,
            apart=_apart(step.losses, steps[base].losses),
            rounds=rounds,
        )
        outcome.rows.append(row)
    return outcome


def _exactness(ways: Sequence[Way], posed: Posed, outcome: Outcome) -> dict[str, float]:
    """Return how far the losses of each way are from the model as it is in float64, on few images.

    Who fails or is wrong is noted in the outcome.
    """
    few = posed._replace(
        training=copy.deepcopy(posed.training).double(),
        images=posed.images[:4].double(),
        labels=posed.labels[:4],
    )
    found: dict[str, float] = {}
    expected: list[float] = []
    for way in (way for way in ways if way.is_ours):
        try:
            step = Training(way, few)
            for _ in range(CHECKED):
                step()
            expected = expected or step.losses
            error = _apart(step.losses, expected)
            if not error <= _EXACT:
                raise WrongResult(f"its losses in float64 are off by {error:.2g}")
            found[way.name] = error
        except Exception as error:  # the others are measured yet
            if way is STOCK:
                raise
            outcome.failed[way.name] = said(error)
    return found


def _prepared(way: Way, posed: Posed) -> tuple[Autocast, float | None]:
    """Return a step that was done a few times, and the most memory, in MB, that it took."""
    device = posed.images.device
    watched = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if watched else 0
    step = Autocast(way, posed)
    step()  # captured or compiled, which takes memory, too
    if watched:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(_WATCHED):
        step()
    peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if watched else None
    return step, peak


def _check(way: Way, loss: float, expected: float) -> None:
    """Raise WrongResult unless the first loss is near that of the model as it is."""
    error = abs(loss / expected - 1)
    if not error <= _CLOSE:
        raise WrongResult(f"{way.name} is wrong: its first loss is off by {error:.2g}")
