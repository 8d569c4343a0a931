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
    spreads: list[float] = []
    collapse = None
    rounds = chain.from_iterable(limited(data, max_batches) for _ in repeat(None))
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad(), uncompiled():
            for _, batch in zip(range(steps), rounds, strict=False):
                logits = logits_of(call_with(model, batch, call))
                if logits is None:
                    raise ValueError(
                        "the model returns no logits, a tensor (N, classes) or an object that has "
                        "it as .logits: give call=lambda model, batch: ... that returns them"
                    )
                entropy, spread = _entropies(logits)
                entropies.append(float(entropy.detach()))
                spreads.append(spread)
                collapse = _collapsed(entropies, spreads)
                if collapse is not None:
                    break
                gradients = torch.autograd.grad(entropy, tensors, allow_unused=True)
                with torch.no_grad():
                    for tensor, gradient in zip(tensors, gradients, strict=True):
                        if gradient is not None:
                            tensor.sub_(gradient, alpha=learning_rate)
    finally:
        for p, was in wanted:
            p.requires_grad_(was)
        modes.restore()
    if collapse is None and not all(bool(tensor.isfinite().all()) for tensor in tensors):
        collapse = "gamma or beta are not finite: take a lower learning_rate"
    if collapse is not None:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
    kept = 0 if collapse is not None else len(entropies)
    ends = (entropies[0], entropies[-1]) if entropies else (0.0, 0.0)
    return Sharpened(kept, ends, collapse)


def _entropies(logits: Tensor) -> tuple[Tensor, float]:
    """Return the mean entropy of the predictions, and the entropy of their mean."""
    logs = logits.float().log_softmax(1)
    entropy = -(logs.exp() * logs).sum(1).mean()
    mean = logs.detach().exp().mean(0)
    return entropy, float(-(mean * mean.clamp(min=1e-30).log()).sum())


def _collapsed(entropies: list[float], spreads: list[float]) -> str | None:
    if not math.isfinite(entropies[-1]):
        return "predictions are not finite: take a lower learning_rate"
    if spreads[-1] < _GUARD * spreads[0]:
        return (
            f"predicted classes grew fewer: their entropy fell from {spreads[0]:.2f} to "
            f"{spreads[-1]:.2f} nats in {len(spreads)} steps"
        )
    return None
