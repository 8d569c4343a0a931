"""Gradient accumulation that is a step on one big batch, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import Plain, Tracked
from batchnorm.layers import Ledger
from batchnorm.models.adopt import held
from batchnorm.models.batches import Buffers, rng_states, set_rng_states, uncompiled
from batchnorm.models.parts import Parts
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms


@dataclass(repr=False)
class BigBatchReport(Report):
    """What a step on a big batch took.

    Attributes:
        loss: The sum of the losses of the micro-batches: the loss of the big batch.
        forward_passes: How often all micro-batches were gone through, without a gradient.
        backward_passes: How often with one.
    """

    loss: float = 0.0
    forward_passes: int = 0
    backward_passes: int = 0

    verb: str = "pooled"


def big_batch(
    model: nn.Module,
    micro_batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    max_passes: int | None = None,
    where: Where = None,
) -> BigBatchReport:
    """Add the gradients of one big batch, given in parts, to those of the parameters.

    Every batch norm normalizes by the moments of all parts together, the gradient flows back
    through them, and the running statistics follow as in one pass: loss and gradients are those of
    one pass over the big batch, to rounding, in the memory of a micro-batch. The price is time. The
    moments of a layer depend on those of the layers before it, so the parts are gone through
    without a gradient until no moment changes; and the two sums that the gradient needs depend on
    those of the layers behind it, so they are gone through with one until no sum changes. For a
    chain of n batch norms that is n passes without a gradient, and n + 1 with one.

    The passes before the last leave no trace: random numbers (dropout) are drawn again, the same
    for each part, and what else the model remembers in buffers is what it would be after one pass.
    A model that was compiled runs as it was written.

    Args:
        model: The model; its mode is used as it is. It must hold all parameters that the loss
            depends on: those of others would get the gradients of each pass.
        micro_batches: The parts; all of them are kept.
        loss: Called as `loss(model, micro_batch)`. What it returns must add up to the loss of the
            big batch: a sum over examples, divided by their number in the big batch.
        max_passes: How many passes each way at most. Fewer than it takes leaves the layers that
            are farthest from the input (forward) or the loss (backward) with the moments and sums
            of the pass before.
        where: Which layers; see `freeze`. The others are normalized by the micro-batch.

    Returns:
        The loss, and the passes that it took.

    Raises:
        ValueError: There are no parts, `where` names no layer, or `max_passes` is below 1.
        RuntimeError: A layer is synchronized over processes or in a transaction, or the loss
            takes a gradient of a gradient.
        TypeError: A layer is of a class of which nobody knows what its forward does.

    Example:
        >>> import batchnorm as bn, torch
        >>> layer, x = bn.BatchNorm(3), torch.randn(32, 3)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), layer, torch.nn.Sigmoid())
        >>> mean = lambda model, part: model(part).square().sum() / len(x)
        >>> mean(model, x).backward()
        >>> expected = model[0].weight.grad.clone()
        >>> model.zero_grad()
        >>> report = bn.big_batch(model, x.split(8), mean)
        >>> torch.allclose(model[0].weight.grad, expected, atol=1e-6)
        True
        >>> report.forward_passes, report.backward_passes
        (1, 2)
    """
    parts = list(micro_batches)
    if not parts:
        raise ValueError("there are no micro-batches")
    if max_passes is not None and max_passes < 1:
        raise ValueError(f"max_passes is {max_passes}: expected 1 or more")
    layers = batch_norms(model, where)
    for name, layer in layers.items():
        if isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "process_group", None) is not None:
            raise RuntimeError(
                f"{name!r} is synchronized over processes: make it local (bn.unsynchronize)"
            )
    report = BigBatchReport(done=list(layers))
    gradients = {p: p.grad for p in model.parameters()}
    buffers, random = Buffers(model), rng_states()

    def go_through(pools: list[Parts], backward: bool) -> float:
        set_rng_states(random)
        buffers.restore()
        for parameter in gradients:
            parameter.grad = None
        total = 0.0
        for at, part in enumerate(parts):
            for pool in pools:
                pool.begin(at, backward)
            with torch.set_grad_enabled(backward):
                value = loss(model, part)
            total += float(value.detach())
            if backward:
                value.backward()  # type: ignore[no-untyped-call]
        return total

    def is_enough(passes: int, calls: int) -> bool:
        # each pass settles one call more, and rounding that differs must not keep it going
        return passes >= max(1, calls if max_passes is None else min(calls, max_passes))

    try:
        with _pooled(layers) as pools, uncompiled():
            is_settled = False
            while not is_settled:
                go_through(pools, backward=False)
                report.forward_passes += 1
                changed = [pool.settle_moments() for pool in pools]
                calls = sum(len(pool.all_moments) for pool in pools)
                is_settled = not any(changed) or is_enough(report.forward_passes, calls)
            is_settled = False
            while not is_settled:
                report.loss = go_through(pools, backward=True)
                report.backward_passes += 1
                changed = [pool.settle_sums() for pool in pools]
                calls = sum(len(pool.all_sums) for pool in pools)
                is_settled = not any(changed) or is_enough(report.backward_passes, calls + 1)
    except BaseException:
        buffers.restore()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        raise
    for parameter, before in gradients.items():
        if before is not None:
            new = parameter.grad
            parameter.grad = before if new is None else before + new
    for layer, pool in zip(layers.values(), pools, strict=True):
        pool.lead(layer)
    return report


class _Unheard(Ledger):
    """A ledger that keeps nothing: the running statistics wait for the end."""

    def add(self, found: Plain | Tracked) -> None:
        """Forget what a call found."""


@contextmanager
def _pooled(layers: dict[str, _BatchNorm]) -> Iterator[list[Parts]]:
    """Let each layer normalize by all parts, and nothing follow; all is restored at the end."""
    with held(layers, "big_batch") as ours:
        pools = [Parts(layer._is_updating()) for layer in ours.values()]
        for layer, pool in zip(ours.values(), pools, strict=True):
            layer.pooled, layer.ledger = pool, _Unheard()
            layer.update = "always" if pool.is_updating else "never"
        yield pools
