"""The gap between evaluation and training: where it opens, and which other finding explains it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.check.finding import Finding, Severity, number
from batchnorm.diagnose.check.seen import SeenByLayer
from batchnorm.layers import BatchNorm

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known

#: Half a standard deviation: a ReLU then passes 19 % more of a normal channel's values, or fewer.
OPEN = 0.5
#: Where there are no labels to tell what it does: as far as all of a channel's spread.
_WIDE = 1.0
#: Its square is one percent of the variance: whatever the cause, no harm is done.
HARMLESS = 0.1
#: How many times the gap that sampling alone makes.
_SURE = 3.0
#: By how much accuracy may be lower in evaluation, beside three times what chance makes.
_ACCURACY = 0.05

#: The findings that explain a gap at their layer, and those that explain it wherever it opens.
_HERE = (
    "non_finite_statistics", "negative_variance", "never_updated", "momentum_zero", "not_converged",
    "momentum_convention", "padding_in_statistics", "dropout_before_norm", "exploding_variance",
    "constant_channels",
)  # fmt: skip
_ANYWHERE = ("ranks_disagree", "unshuffled_batches", "small_batch")


class Gap(NamedTuple):
    """How far running statistics are from what a layer gets.

    Attributes:
        distance: In standard deviations; infinite where the statistics are no numbers.
        noise: How much of it sampling alone would make.
    """

    distance: float
    noise: float

    @property
    def is_open(self) -> bool:
        """Return whether it is large, and more than chance."""
        return self.distance > OPEN and self.distance > _SURE * self.noise


def gaps(layers: Mapping[str, _BatchNorm], seen: Mapping[str, SeenByLayer]) -> dict[str, Gap]:
    """Return the gaps of the layers that have running statistics and got something finite.

    What a layer normalizes to has mean d and standard deviation s in place of 0 and 1. Of normal
    distributions, the distance (Wasserstein's, of order 2) is the root of d^2 + (s - 1)^2.
    """
    return {
        name: gap_of(layers[name], found)
        for name, found in seen.items()
        if name in layers and found.moments is not None and _is_by_running(layers[name])
    }


def _is_by_running(layer: _BatchNorm) -> bool:
    by_batch = isinstance(layer, BatchNorm) and layer.statistics == "batch"
    return layer.running_mean is not None and not by_batch


def gap_of(layer: _BatchNorm, seen: SeenByLayer, left: float = 0) -> Gap:
    """Return the gap of a layer.

    Args:
        layer: It, with running statistics.
        seen: What it got, something finite.
        left: How much of mean 0 and variance 1 is taken out of the statistics before.
    """
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert seen.moments is not None
    mean, var = seen.moments.mean, seen.variance()
    scale = (layer.running_var.to(var) - left) / (1 - left) + layer.eps
    shift = (mean - layer.running_mean.to(mean) / (1 - left)).square() / scale
    squared = float((shift + ((var + layer.eps) / scale).sqrt().sub(1).square()).mean())
    # a running average by momentum m is as noisy as (2 - m) / m batches, of the size of these
    share = 0 if layer.momentum is None else min(max(layer.momentum, 0), 1)
    spread, noise = seen.spread, 0.0
    if spread.batches:
        examples = 1 / spread.examples + share / (2 - share) / spread.largest
        # relative to the data's own variance: it is that of the statistics, if there is no gap
        own = var + layer.eps
        of_root = seen.squares.variance() / own / 4  # of a square root, half the relative error
        noise = float(((spread.variance() + of_root) / own).mean()) * examples
    return Gap(
        math.sqrt(squared) if math.isfinite(squared) else math.inf,
        math.sqrt(noise) if math.isfinite(noise) and noise > 0 else 0.0,
    )


def find(known: Known, others: Sequence[Finding]) -> Iterator[Finding]:
    """Find the layer at which evaluation departs from training, given what else was found."""
    opened = [name for name, gap in known.gaps.items() if gap.is_open]
    accuracy = known.outputs.accuracy()
    drop = 0.0 if accuracy is None else accuracy["batch"] - accuracy["evaluation"]
    is_worse = drop > _ACCURACY + 3 * known.outputs.uncertainty()
    if opened:
        first = opened[0]
    elif is_worse and known.gaps:  # many small gaps, of which none is large
        half = max(gap.distance for gap in known.gaps.values()) / 2
        first = next(name for name, gap in known.gaps.items() if gap.distance >= half)
    else:
        return
    gap = known.gaps[first].distance
    evidence = [
        f"what it gets in evaluation is {number(gap)} standard deviations from its running "
        "statistics"
    ]
    if len(opened) > 1:
        evidence.append(f"{len(opened)} of {len(known.gaps)} layers are over {OPEN}")
    if accuracy is not None:
        evidence.append(
            f"accuracy is {accuracy['evaluation']:.3f}, and {accuracy['batch']:.3f} by the "
            "batches' moments"
        )
    elif (distance := known.outputs.distance()) is not None:
        evidence.append(f"outputs differ by {number(distance)} of their standard deviation")
    cause, fix = _explained(known, first, others)
    is_severe = is_worse if accuracy is not None else gap > _WIDE
    severity: Severity = "error" if is_severe else "warning"
    yield Finding("eval_train_gap", severity, first, "; ".join(evidence), cause, fix)


def _explained(known: Known, first: str, others: Sequence[Finding]) -> tuple[str, str]:
    """Return the cause and the fix of a gap that opens at a layer."""
    names = list(known.gaps)
    before = names[: names.index(first)]
    places = [*((code, [first]) for code in _HERE), *((code, before) for code in _HERE)]
    for code, layers in [*places, *((code, None) for code in _ANYWHERE)]:
        for finding in others:
            if finding.code == code and (layers is None or finding.layer in layers):
                return f"{code} of {finding.layer or 'the model'!r}, see there", finding.fix
    if known.is_frozen(first):
        return (
            "its statistics are frozen, and not those of what it gets now",
            known.recalibrated(first),
        )
    where = "the weights or the data" if next(iter(known.gaps)) == first else "the weights before"
    return (
        f"{where} are not those that the statistics were taken with: averaged, quantized, loaded "
        "or moved since, or another preparation of the data",
        known.recalibrated(first),
    )
