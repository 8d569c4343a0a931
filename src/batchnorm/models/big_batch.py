"""Gradient accumulation that is a step on one big batch, exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import State, Tracked, follow
from batchnorm.models.adopt import adopt, let_go
from batchnorm.models.batches import rng_states, set_rng_states
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms
from batchnorm.moments import Moments


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

    verb = "pooled"


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
    through them, and the running statistics follow once: loss and gradients are those of one pass
    over the big batch, to rounding, in the memory of a micro-batch. The price is time. The moments
    of a layer depend on those of the layers before it, so the parts are gone through without a
    gradient until no moment changes; and the two sums that the gradient needs depend on those of
    the layers behind it, so they are gone through with one until no sum changes. For one batch
    norm that is two passes each way; for a chain of n it is n + 1.

    Args:
        model: The model. Its mode is used as it is, and random numbers (dropout) are drawn again
            for each pass, the same for each part.
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
        RuntimeError: A layer is synchronized over processes or in a transaction.
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
        (2, 2)
    """
    parts = list(micro_batches)
    if not parts:
        raise ValueError("there are no micro-batches")
    if max_passes is not None and max_passes < 1:
        raise ValueError(f"max_passes is {max_passes}: expected 1 or more")
    report, pools = BigBatchReport(), {}
    gradients = {p: p.grad for p in model.parameters()}
    random = rng_states()
    layers = batch_norms(model, where)
    try:
        for name, candidate in layers.items():
            layer = adopt(name, candidate, "big_batch")
            if layer.process_group is not None or layer.ledger is not None:
                state = "in a transaction" if layer.ledger else "synchronized over processes"
                raise RuntimeError(f"{name!r} is {state}: a big batch is neither")
            parted = _Parts(layer._is_updating())
            pools[name] = layer, parted, layer.__dict__.get("update")
            layer.pooled, layer.update = parted, "never"

        def run(backward: bool) -> float:
            total = 0.0
            set_rng_states(random)
            for at, part in enumerate(parts):
                for _, pool, _ in pools.values():
                    pool.begin(at, backward)
                with torch.set_grad_enabled(backward):
                    value = loss(model, part)
                total += float(value.detach())
                if backward:
                    value.backward()  # type: ignore[no-untyped-call]
            return total

        while True:
            run(backward=False)
            report.forward_passes += 1
            changed = [pool.settle_moments() for _, pool, _ in pools.values()]
            if not any(changed) or report.forward_passes == max_passes:
                break
        while True:
            for parameter in gradients:
                parameter.grad = None
            report.loss = run(backward=True)
            report.backward_passes += 1
            changed = [pool.settle_sums() for _, pool, _ in pools.values()]
            if not any(changed) or report.backward_passes == max_passes:
                break
        for parameter, before in gradients.items():
            if before is not None and parameter.grad is not None:
                parameter.grad = before + parameter.grad
        gradients = {p: p.grad if p.grad is not None else g for p, g in gradients.items()}
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for layer, _, update in pools.values():
            layer.__dict__.pop("pooled", None)
            layer.__dict__.pop("update", None)
            if update is not None:
                layer.update = update
        for name in pools:
            let_go(pools[name][0], "big_batch")
    for layer, pool, _ in pools.values():
        pool.lead(layer)
    report.done = list(pools)
    return report


class _Parts:
    """The parts of a big batch, for one layer: what each had in the last pass, by call.

    A layer may be called several times with a part; each call of one part is pooled with that of
    the others.
    """

    def __init__(self, is_updating: bool) -> None:
        self._is_updating = is_updating
        self.moments: dict[int, dict[int, Moments]] = defaultdict(dict)  # by call, by part
        self.sums: dict[int, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
        self.all_moments: dict[int, Moments] = {}  # by call
        self.all_sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._part = self._call = 0
        self.is_settled = False

    def begin(self, part: int, is_settled: bool) -> None:
        """Say which part comes next, and whether the moments are settled."""
        self._part, self._call, self.is_settled = part, 0, is_settled

    def __call__(self) -> _Others:
        """Return what the next call of the layer is pooled with."""
        call, self._call = self._call, self._call + 1
        return _Others(self, self._part, call)

    def settle_moments(self) -> bool:
        """Merge what the parts had in this pass, and return whether that changed anything."""
        before = self.all_moments
        self.all_moments = {call: Moments.sum(own.values()) for call, own in self.moments.items()}
        return not _same(
            {call: (m.mean, m.m2) for call, m in before.items()},
            {call: (m.mean, m.m2) for call, m in self.all_moments.items()},
        )

    def settle_sums(self) -> bool:
        """Add up what the parts had in this pass, and return whether that changed anything."""
        before = self.all_sums
        self.all_sums = {}
        for call, own in self.sums.items():
            first, second = (
                torch.stack(values).sum(0) for values in zip(*own.values(), strict=True)
            )
            self.all_sums[call] = first, second
        return not _same(before, self.all_sums)

    def lead(self, layer: _BatchNorm) -> None:
        """Let the running statistics of the layer follow the big batch, if they follow at all."""
        mean, var = layer.running_mean, layer.running_var
        if mean is None or var is None or not self.all_moments or not self._is_updating:
            return
        total = Tracked(Moments.sum(self.all_moments.values()))
        follow(total, State(mean, var, layer.num_batches_tracked), layer.momentum)


class _Others:
    """What one call is pooled with: the same call of all parts, as of the pass before."""

    def __init__(self, parts: _Parts, part: int, call: int) -> None:
        self._parts, self._part, self._call = parts, part, call

    def moments(self, own: Moments) -> Moments:
        """Return the moments of all parts, as far as they are known."""
        if not self._parts.is_settled:
            self._parts.moments[self._call][self._part] = own
        return self._parts.all_moments.get(self._call, own)

    def sums(self, sum_g: Tensor, sum_g_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two sums over all parts, as far as they are known."""
        own = sum_g, sum_g_xhat
        self._parts.sums[self._call][self._part] = own
        return self._parts.all_sums.get(self._call, own)


def _same(
    before: dict[int, tuple[Tensor, Tensor]], after: dict[int, tuple[Tensor, Tensor]]
) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(a, b) for call in after for a, b in zip(before[call], after[call], strict=True)
    )
