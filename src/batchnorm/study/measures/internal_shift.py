"""What a step does to the hidden distributions, and to the gradients of the layers behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from batchnorm.study.descent import step
from batchnorm.study.measures.runs import MOST, held
from batchnorm.study.networks import activations, maps
from batchnorm.study.training import Result, State

_EXAMPLES = 500  # held-out ones: enough for two digits of a moment
_PERCENTILES = (15, 50, 85)  # those of figure 1 of Ioffe & Szegedy (2015)

UNITS = 16  # of the last hidden layer, at the most


class _Seen(TypedDict):
    percentiles: list[list[float]]
    moved: list[float]


def distribution_shift(state: State) -> _Seen:
    """Return percentiles of the last hidden units, and how far a step moves each layer's."""
    model = state.copy()
    x = state.held_out[0][:_EXAMPLES]
    before, last = _moments(model, x)
    step(model, *state.batch, state.rate)
    after, _ = _moments(model, x)
    moved = [hellinger(a, b).mean().item() for a, b in zip(before, after, strict=True)]
    units = torch.nan_to_num(last.movedim(1, 0).flatten(1)[:UNITS]).clamp(-MOST, MOST)
    percentiles = np.percentile(units.numpy(), _PERCENTILES, axis=1).T
    return {"percentiles": percentiles.tolist(), "moved": moved}


def _moments(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Mean and variance, by channel, of what each activation gets; all that the last one gets."""
    moments: list[Tensor] = []
    last = x

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal last
        (last,) = inputs
        channels = last.movedim(1, 0).flatten(1).double()
        moments.append(torch.stack([channels.mean(1), channels.var(1, correction=0)]))

    hooks = [layer.register_forward_pre_hook(look) for layer in activations(model)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return moments, last


def hellinger(first: Tensor, second: Tensor) -> Tensor:
    """Return the Hellinger distance of normal distributions, from 0 to 1 where none overlaps.

    Args:
        first: Means and variances, in float64, shape (2, C).
        second: The same of the others.

    Example:
        >>> narrow, far = (torch.tensor([[m], [1.0]], dtype=torch.float64) for m in (0, 0.01))
        >>> round(hellinger(narrow, far).item(), 6)  # a small move: its share of std / sqrt(8)
        0.003536
    """
    (m, v), (n, w) = first, second
    s, t = (variance.sqrt().clamp(min=1e-12) for variance in (v, w))
    overlap = -0.5 * torch.log1p((s - t) ** 2 / (2 * s * t)) - (m - n) ** 2 / (4 * (s**2 + t**2))
    return torch.nan_to_num((-torch.expm1(overlap)).sqrt(), nan=1.0)


def gradient_shift(state: State) -> list[tuple[float, float]]:
    """Return how much each map's gradient changes by the step of what comes before it.

    For each map but the first: the length of the change as a share of the gradient's, and the
    cosine of the angle between both.
    """
    model, moved = state.copy(), state.copy()
    step(moved, *state.batch, state.rate)
    weights = [layer.weight for layer in maps(model)]
    before = dict(zip(weights, _gradients(model, state, weights), strict=True))
    seen = []
    for parameter, after in zip(model.parameters(), moved.parameters(), strict=True):
        if parameter in before and parameter is not weights[0]:
            (now,) = _gradients(model, state, [parameter])
            was = before[parameter]
            far = held(float((now - was).norm() / was.norm().clamp(min=1e-30)))
            cosine = cosine_similarity(now.flatten(), was.flatten(), 0, 1e-30)
            seen.append((far, torch.nan_to_num(cosine).item()))
        with torch.no_grad():
            parameter.copy_(after)
    return seen


def _gradients(model: nn.Module, state: State, weights: list[Tensor]) -> Sequence[Tensor]:
    x, y = state.batch
    return torch.autograd.grad(cross_entropy(model(x), y), weights)


def moved(result: Result) -> list[float]:
    """Return how far each step that was looked at moved the distributions, over all layers."""
    return [held(float(np.mean(seen["moved"]))) for seen in result.seen(distribution_shift)]


def wandered(result: Result) -> float:
    """Return how far a typical unit's percentiles wander over a run, in units of their spread."""
    seen = np.array([seen["percentiles"] for seen in result.seen(distribution_shift)])
    spread = (seen[:, :, 2] - seen[:, :, 0]).mean(0).clip(1e-12)
    return held(float(np.median(np.ptp(seen, axis=0).mean(1) / spread)))


def turned(result: Result) -> list[float]:
    """Return how much each step that was looked at changed the gradients, over all layers."""
    return [float(np.mean([far for far, _ in seen])) for seen in result.seen(gradient_shift)]


def kept(result: Result) -> float:
    """Return the cosine between the gradients before and after, over all looks and layers."""
    return float(
        np.mean([np.mean([cosine for _, cosine in s]) for s in result.seen(gradient_shift)])
    )
