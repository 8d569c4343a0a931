"""Statistics that were never updated, or not often enough to have forgotten where they began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.check.finding import Finding, number
from batchnorm.diagnose.check.gap import HARMLESS, OPEN, gap_of

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known

#: How much of the start may be left in the statistics: what one batch of twenty counts for.
_LEFT = 0.05
_ALL = 0.999  # of it, so that something is left besides


def find(known: Known) -> Iterator[Finding]:
    """Find statistics that are still what they began with, or largely so."""
    is_young = _is_young(known)
    for name, layer in known.layers.items():
        mean, var, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if mean is None or var is None:
            continue
        gap = known.gaps.get(name)
        tracked = None if batches is None else int(batches)
        counted = "" if tracked is None else f", num_batches_tracked {tracked}"
        if is_initial(layer):
            moved = [p for p in ("weight", "bias") if _has_moved(getattr(layer, p))]
            is_off = gap is not None and gap.is_open
            if layer.momentum == 0 or not (moved or is_off):
                continue
            shown = [f"{moved[0]} is not what a layer begins with"] if moved else []
            if gap is not None:
                shown.append(f"what it gets is {number(gap.distance)} standard deviations off")
            yield Finding(
                "never_updated",
                # a weight alone may have been drawn at random
                "error" if is_off or tracked or "bias" in moved else "warning",
                name,
                f"running_mean is 0 and running_var 1{counted}, but {' and '.join(shown)}",
                "the model was trained in evaluation mode, the statistics were frozen or reset, or "
                "the checkpoint has none",
                known.recalibrated(name),
            )
            continue
        left = _left(layer)
        share = _share(layer, left)
        if share <= _LEFT or (gap is not None and gap.distance < HARMLESS) or not is_young:
            continue
        yield Finding(
            "not_converged",
            "warning",
            name,
            f"after {tracked} batch{'es' * (tracked != 1)} by momentum "
            f"{number(layer.momentum or 0)}, {left:.1%} of the start is left, mean 0 and variance "
            f"1: {share:.0%} of the statistics",
            "too few steps for the momentum, the more so where variances are small",
            known.recalibrated(name),
        )


def _left(layer: _BatchNorm) -> float:
    """Return how much of the statistics is what they began with, as far as that can be known."""
    var, momentum, batches = layer.running_var, layer.momentum, layer.num_batches_tracked
    if var is None or momentum is None or batches is None or not 0 < momentum < 1:
        return 0.0
    left = min(float((1 - momentum) ** int(batches)), _ALL) if int(batches) else 0.0
    # a running average contains that much of the variance 1; what was calibrated mostly does not
    return left if bool((var >= 0.999 * left).all()) else 0.0


def _share(layer: _BatchNorm, left: float) -> float:
    """Return how much of the statistics is their start: of small variances, it is more."""
    assert layer.running_var is not None
    return max(left, float((left / layer.running_var.double().clamp(min=left + 1e-30)).mean()))


def _is_young(known: Known) -> bool:
    """Return whether nothing speaks against running averages that contain what they began with.

    Data do, if they do not fit better without it. The first layer tells: the others are behind it.
    """
    for name, gap in known.gaps.items():
        layer = known.layers[name]
        left = _left(layer)
        if _share(layer, left) > _LEFT:
            without = gap_of(layer, known.seen[name], left)
            return without.distance < min(OPEN, gap.distance / 2)
    return not known.gaps


def is_initial(layer: _BatchNorm) -> bool:
    """Return whether the statistics are those that a layer begins with."""
    mean, var = layer.running_mean, layer.running_var
    return (
        mean is not None
        and var is not None
        and not bool(mean.count_nonzero())
        and bool((var == 1).all())
    )


def _has_moved(parameter: Tensor | None) -> bool:
    """Return whether a parameter was trained; what is the same everywhere may be the start."""
    return parameter is not None and bool((parameter != parameter[0]).any())
