"""The table of all that was measured: a row for each network, layout, mode and way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from batchnorm.bench.rows import ratios, rounded
from benchmarks.models.check import apart
from benchmarks.models.measure import Taken
from benchmarks.models.ways import STOCK


@dataclass(frozen=True)
class Row:
    """One way to run a network; its attributes are the columns of the CSV file.

    What is not there for a mode, or was not measured, is None: an empty field.

    Attributes:
        network: What it is called.
        batch: The number of images.
        image: How high and wide they are.
        layout: The order of their dimensions in memory.
        mode: A step of training, or inference.
        threads: How many there are.
        way: How the network is run.
        q25_ms: The lower quartile of the times, in milliseconds.
        median_ms: Their median.
        q75_ms: Their upper quartile.
        ratio: How many times the speed of the network as it is: the median over the rounds.
        ratio_q25: Its lower quartile.
        ratio_q75: Its upper quartile.
        rounds: How often it was timed.
        kept_mb: What autograd keeps until the backward pass, in MB.
        kept_ratio: That against the network as it is.
        peak_mb: What a step takes at its peak, in MB.
        peak_ratio: That against the network as it is.
        error: Against float64: of all gradients of the first step, or the largest of the logits.
        loss_error: Against float64: of the loss of the first step.
        steps: Over how many steps the losses are compared.
        loss_first: The loss of the first step.
        loss_last: That of the last.
        losses_apart: The largest relative difference to the losses of the network as it is.
        losses_apart_float64: The same in float64, with fewer and smaller images.
    """

    network: str
    batch: int
    image: int
    layout: str
    mode: str
    threads: int
    way: str
    q25_ms: float
    median_ms: float
    q75_ms: float
    ratio: float
    ratio_q25: float
    ratio_q75: float
    rounds: int
    kept_mb: float | None
    kept_ratio: float | None
    peak_mb: float | None
    peak_ratio: float | None
    error: float
    loss_error: float | None
    steps: int | None
    loss_first: float | None
    loss_last: float | None
    losses_apart: float | None
    losses_apart_float64: float | None


def rows(taken: Iterable[Taken]) -> list[Row]:
    """Return the rows of all that was measured."""
    return [row for each in taken for row in _rows(each)]


def _rows(taken: Taken) -> Iterator[Row]:
    network = taken.case.network
    for name, (own, beside) in taken.times.items():
        low, median, high = np.quantile(own, (0.25, 0.5, 0.75)).tolist()
        ratio_low, ratio, ratio_high = ratios(beside, own)
        losses, others = taken.losses.get(name), taken.losses.get(STOCK.name, [])
        if losses is not None:
            losses = losses[: min(len(others), taken.case.steps)]
        errors, trained = taken.errors[name], losses is not None
        yield Row(
            network=network.title,
            batch=network.batch,
            image=network.image,
            layout=taken.case.layout,
            mode=taken.mode,
            threads=torch.get_num_threads(),
            way=name,
            q25_ms=rounded(low * 1e3),
            median_ms=rounded(median * 1e3),
            q75_ms=rounded(high * 1e3),
            ratio=rounded(ratio),
            ratio_q25=rounded(ratio_low),
            ratio_q75=rounded(ratio_high),
            rounds=len(own),
            kept_mb=_part(taken.kept.get(name), 1e6),
            kept_ratio=_part(taken.kept.get(name), taken.kept.get(STOCK.name)),
            peak_mb=_part(taken.peaks.get(name), 1),
            peak_ratio=_part(taken.peaks.get(name), taken.peaks.get(STOCK.name)),
            error=rounded(errors.result, 2),
            loss_error=rounded(errors.loss, 2) if trained else None,
            steps=len(losses) if losses is not None else None,
            loss_first=losses[0] if losses else None,
            loss_last=losses[-1] if losses else None,
            losses_apart=rounded(apart(losses, others), 2) if losses else None,
            losses_apart_float64=_part(taken.exact.get(name), 1, 2),
        )


def _part(value: float | None, whole: float | None, digits: int = 4) -> float | None:
    """Return value / whole, where both are known."""
    return None if value is None or not whole else rounded(value / whole, digits)
