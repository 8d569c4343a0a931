"""What a step does to the hidden distributions, and to the gradients of the layers behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from batchnorm.study.descent import step
from batchnorm.study.measures.runs import MOST, held
from batchnorm.study.networks import activations, maps
from batchnorm.study.observation import Result, State

_EXAMPLES = 500  # held-out ones: enough for two digits of a moment
PERCENTILES = (15, 50, 85)  # those of figure 1 of Ioffe & Szegedy (2015)

UNITS = 16  # of the last hidden layer, at the most


class _Seen(TypedDict):
    percentiles: list[list[float]]
    moved: list[float]
    put_out: list[float]


def distribution_shift(state: State) -> _Seen:
    """Return percentiles of the last hidden units, and how far a step moves each layer's.

    That is what each activation gets, and what each map but the last puts out.
    """
    model = state.copy()
    x = state.held_out[0][:_EXAMPLES]
    percentiles = last_percentiles(model, x, UNITS)
    before = _moments(model, x)
    step(model, *state.batch, state.rate)
    after = _moments(model, x)
    moved, put_out = (
        [hellinger(a, b).mean().item() for a, b in zip(was, now, strict=True)]
        for was, now in zip(before, after, strict=True)
    )
    return {"percentiles": percentiles, "moved": moved, "put_out": put_out}


def last_percentiles(model: nn.Module, x: Tensor, units: int) -> list[list[float]]:
    """Return percentiles of what the last activation gets, from the first units on.

    Args:
        model: A network that may be changed: in training its running statistics are.
        x: Inputs.
        units: How many units, or channels, at the most.

    Returns:
        The 15th, the 50th and the 85th percentile of each, over inputs and positions.
    """
    seen: list[Tensor] = []
    hook = activations(model)[-1].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model(x)
    hook.remove()
    values = torch.nan_to_num(seen[0].movedim(1, 0).flatten(1)[:units]).clamp(-MOST, MOST)
    percentiles: list[list[float]] = np.percentile(values.numpy(), PERCENTILES, axis=1).T.tolist()
    return percentiles


def _moments(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance, by channel, of what activations get, and of what hidden maps put out."""
    got: list[Tensor] = []
    put_out: list[Tensor] = []

    def look(values: Tensor, moments: list[Tensor]) -> None:
        channels = values.movedim(1, 0).flatten(1).double()
        moments.append(torch.stack([channels.mean(1), channels.var(1, correction=0)]))

    hooks = [
        *(
            layer.register_forward_pre_hook(lambda _, inputs: look(inputs[0], got))
            for layer in activations(model)
        ),
        *(
            layer.register_forward_hook(lambda _, __, output: look(output, put_out))
            for layer in maps(model)[:-1]
        ),
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return got, put_out


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


def moved_before(result: Result) -> list[float]:
    """Return the same of what the maps put out, before any normalization."""
    return [held(float(np.mean(seen["put_out"]))) for seen in result.seen(distribution_shift)]


def wandered(result: Result) -> float:
    """Return how far a typical unit's percentiles wander over a run, in units of their spread."""
    return ranges([seen["percentiles"] for seen in result.seen(distribution_shift)])


def ranges(percentiles: ArrayLike) -> float:
    """Return how far percentiles range over the looks, in units of their mean spread.

    Args:
        percentiles: By look and unit, three of them.

    Returns:
        The mean over the three, the median over the units.

    Example:
        >>> ranges([[[-1, 0, 1]], [[-1, 1, 3]]])  # by 0, 1 and 2; 3 from first to last
        0.3333333333333333
    """
    seen = np.asarray(percentiles, float)
    spread = (seen[:, :, 2] - seen[:, :, 0]).mean(0).clip(1e-12)
    return held(float(np.median(np.ptp(seen, axis=0).mean(1) / spread)))


def turned(result: Result) -> list[float]:
    """Return how much each step that was looked at changed the gradients, over all layers."""
    return [float(np.mean([far for far, _ in seen])) for seen in result.seen(gradient_shift)]


def kept(result: Result) -> list[float]:
    """Return the cosine between the gradients before and after, over all layers, at each look."""
    return [float(np.mean([cosine for _, cosine in s])) for s in result.seen(gradient_shift)]
