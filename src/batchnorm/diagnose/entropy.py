"""Sharper predictions: gamma and beta trained without labels, with a guard against collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.accuracy import logits_of
from batchnorm.models.batches import CallModel, Modes, call_with, limited, uncompiled

#: The predicted classes, as a distribution over all examples, keep at least this part of their
#: entropy: a network that calls everything the same is sharp, and wrong.
_GUARD = 0.8


class Sharpened(NamedTuple):
    """What minimizing the entropy of predictions did.

    Attributes:
        steps: How many steps were taken, and kept.
        entropy: The mean entropy of a prediction, in nats, of the first step and of the last.
        collapse: Why the steps were taken back; None if they were not.
    """

    steps: int
    entropy: tuple[float, float]
    collapse: str | None

    def __str__(self) -> str:
        if self.collapse is not None:
            return f"entropy: taken back, {self.collapse}"
        first, last = self.entropy
        return f"entropy {first:.3g} -> {last:.3g} nats in {self.steps} steps"


def sharpen(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, _BatchNorm],
    steps: int,
    learning_rate: float,
    call: CallModel | None,
    max_batches: int | None,
) -> Sharpened:
    """Train gamma and beta to make predictions sharp; the statistics stay.

    Args:
        model: The model, in evaluation throughout.
        data: The batches, gone through again and again.
        layers: Those whose gamma and beta are trained.
        steps: How many batches are used.
        learning_rate: Of plain gradient descent.
        call: Calls the model with a batch.
        max_batches: How many batches a round has at most.

    Raises:
        ValueError: The model returns no logits, or no layer has gamma or beta.
    """
    tensors = [p for layer in layers.values() for p in layer.parameters(recurse=False)]
    if not tensors:
        raise ValueError("no batch norm has gamma or beta to train: leave entropy_steps at 0")
    before = [tensor.detach().clone() for tensor in tensors]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    modes = Modes(model)
    entropies: list[float] = []
    rounds = chain.from_iterable(limited(data, max_batches) for _ in repeat(None))

    def logits_for(batch: Any) -> Tensor:
        logits = logits_of(call_with(model, batch, call))
        if logits is None:
            raise ValueError(
                "the model returns no logits, a tensor (N, classes) or an object that has it as "
                ".logits: give call=lambda model, batch: ... that returns them"
            )
        return logits.float()

    def spread() -> float:
        """Return the entropy of the mean prediction, over all data."""
        with torch.no_grad():
            sums = [logits_for(batch).softmax(1).sum(0) for batch in limited(data, max_batches)]
        mean = torch.stack(sums).sum(0)
        return float(torch.special.entr(mean / mean.sum()).sum())

    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad(), uncompiled():
            first = spread()
            for _, batch in zip(range(steps), rounds, strict=False):
                logs = logits_for(batch).log_softmax(1)
                entropy = -(logs.exp() * logs).sum(1).mean()
                entropies.append(float(entropy.detach()))
                gradients = torch.autograd.grad(entropy, tensors, allow_unused=True)
                with torch.no_grad():
                    for tensor, gradient in zip(tensors, gradients, strict=True):
                        if gradient is not None:
                            tensor.sub_(gradient, alpha=learning_rate)
            last = spread()
    finally:
        for p, was in wanted:
            p.requires_grad_(was)
        modes.restore()
    collapse = None
    if not math.isfinite(last):
        collapse = "predictions are not finite any more: take a lower learning_rate"
    elif last < _GUARD * first:
        collapse = (
            f"predicted classes grew fewer: their entropy fell from {first:.2f} to {last:.2f} nats"
        )
    if collapse is not None:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
    ends = (entropies[0], entropies[-1]) if entropies else (0.0, 0.0)
    return Sharpened(0 if collapse is not None else len(entropies), ends, collapse)
