"""How the loss and its gradient change along the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.study.measures.runs import geometric, held
from batchnorm.study.observation import Result, State

LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of a step, in units of the learning rate


class _Seen(TypedDict):
    losses: list[float]
    changes: list[float]
    rate: float


def along_the_gradient(state: State) -> _Seen:
    """Return the loss here and along the negative gradient, and the change of the gradient there.

    The loss here comes first; a change is a share of the gradient's length here.
    """
    model = state.copy()
    start = [parameter.detach().clone() for parameter in _trained(model)]
    loss, gradient = _gradient(model, state)
    losses, changes = [loss], []
    for length in LENGTHS:
        with torch.no_grad():
            for parameter, origin, slope in zip(_trained(model), start, gradient, strict=True):
                parameter.copy_(origin - length * state.rate * slope)
        there, now = _gradient(model, state)
        losses.append(there)
        changes.append(_norm([a - b for a, b in zip(now, gradient, strict=True)]))
    whole = max(_norm(gradient), 1e-30)
    return {
        "losses": [held(loss) for loss in losses],
        "changes": [held(change / whole) for change in changes],
        "rate": state.rate,
    }


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradient(model: nn.Module, state: State) -> tuple[float, Sequence[Tensor]]:
    x, y = state.batch
    loss = cross_entropy(model(x), y)
    return loss.item(), torch.autograd.grad(loss, _trained(model))


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def variations(result: Result) -> list[float]:
    """Return by how much the loss varies along the gradient, at each look."""
    losses = [seen["losses"] for seen in result.seen(along_the_gradient)]
    return [held(max(loss) - min(loss)) for loss in losses]


def shares(result: Result) -> list[float]:
    """Return the same as a share of the loss where it starts."""
    starts = [seen["losses"][0] for seen in result.seen(along_the_gradient)]
    return [range_ / start for range_, start in zip(variations(result), starts, strict=True)]


def changes(result: Result) -> list[float]:
    """Return how much the gradient changes along itself, over all lengths, at each look."""
    return [geometric(seen["changes"]) for seen in result.seen(along_the_gradient)]


def smoothness(result: Result) -> list[float]:
    """Return the largest change of the gradient per length of the step, at each look."""
    return [
        max(change / length for change, length in zip(seen["changes"], LENGTHS, strict=True))
        / seen["rate"]
        for seen in result.seen(along_the_gradient)
    ]
