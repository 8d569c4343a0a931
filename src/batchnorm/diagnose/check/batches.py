"""Batches that are too small for their moments, or not shuffled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.check.finding import Finding, number
from batchnorm.layers import BatchNorm, BatchRenorm

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known
    from batchnorm.diagnose.check.spread import Spread

#: Independent examples. Of fewer the mean is off by more than a third of a standard deviation.
_FEW = 8
#: What the estimate of their number may be off by, since no batch of 8 is to be blamed.
_SLACK = 0.94
#: What is suggested in their place.
_ENOUGH = 32
#: Shuffled batches are that far off in one of 30 000 runs.
_SURE = 4.0
#: The means of batches vary twice as much as chance makes them.
_TWICE = 2.0


def find(known: Known) -> Iterator[Finding]:
    """Find layers whose batches are too small, and the first that sees that they are sorted."""
    for name, layer in known.layers.items():
        seen = known.seen.get(name)
        if seen is None or seen.moments is None or not seen.spread.batches:
            continue
        if known.is_frozen(name) or isinstance(layer, BatchRenorm):  # made for small batches
            continue
        live = ~seen.constant()
        if not bool(live.any()):
            continue
        together, made_of = _together(layer, seen.spread.largest)
        # of the variance, how much lies between examples: all of it where each has one value
        share = (seen.spread.variance()[live] / seen.variance()[live]).clamp(max=1).mean()
        independent = together / max(float(share), 1e-9)
        if independent < _FEW * _SLACK:
            yield Finding(
                "small_batch",
                "warning",
                name,
                f"{made_of} are worth {number(independent)} independent values: the mean is off by "
                f"{number(1 / math.sqrt(independent))} standard deviations, the variance by "
                f"{math.sqrt(2 / independent):.0%}",
                "training normalizes by moments that are largely chance, and evaluation does not; "
                "where batches cannot be larger: bn.big_batch, bn.synchronize, or bn.freeze",
                f"{known.spelled(name)}.ghost_size = {_ENOUGH}"
                if made_of.startswith("ghost")
                else f"data = torch.utils.data.DataLoader(data.dataset, {_ENOUGH}, shuffle=True)",
            )
    yield from _unshuffled(known)


def _together(layer: _BatchNorm, examples: int) -> tuple[int, str]:
    """Return how many examples are normalized together in training, and what they are."""
    ghost = layer.ghost_size if isinstance(layer, BatchNorm) else None
    if ghost is not None and ghost < examples:
        examples, made_of = ghost, f"ghost batches of {ghost} examples"
    else:
        made_of = f"batches of {examples} example{'s' * (examples != 1)}"
    processes = _processes(layer)
    if processes > 1:
        made_of += f" on {processes} processes"
    return examples * processes, made_of


def _processes(layer: _BatchNorm) -> int:
    """Return how many processes normalize together."""
    group = getattr(layer, "process_group", None)
    if not isinstance(layer, nn.SyncBatchNorm) and group is None:
        return 1
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(None if group == "world" else group)


def _unshuffled(known: Known) -> Iterator[Finding]:
    names = [name for name in known.seen if name in known.layers]
    spreads: dict[str, Spread] = {name: known.seen[name].spread for name in names}
    first = next((name for name in names if is_sorted(spreads[name])), None)
    if first is None and is_sorted(known.labels):
        first = next(iter(names), None)
    if first is not None:
        yield of_sorted(first, spreads[first], known.labels)


def of_sorted(name: str, spread: Spread, labels: Spread) -> Finding:
    """Return what is to be said of examples that are sorted.

    Args:
        name: The layer that sees it.
        spread: How they are spread over the batches.
        labels: Likewise, their labels.
    """
    excess, sure = spread.excess()
    evidence = (
        f"the means of {spread.batches} batches vary {number(excess)} times as much as "
        f"those of shuffled examples would ({number(sure)} standard deviations of chance)"
    )
    if is_sorted(labels):
        evidence += f"; the labels, {number(labels.excess()[0])} times"
    return Finding(
        "unshuffled_batches",
        "warning",
        name,
        evidence,
        "each batch has examples of a kind, as of one class: its variance lacks what lies between "
        "kinds, and what is learned depends on who else is in the batch",
        "data = torch.utils.data.DataLoader(data.dataset, data.batch_size, shuffle=True)",
    )


def is_sorted(spread: Spread) -> bool:
    """Return whether batches differ by more than chance makes shuffled ones."""
    excess, sure = spread.excess()
    return sure > _SURE and excess > _TWICE
