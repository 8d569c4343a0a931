"""Inputs, and the right answers in float64."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.bench.cases import BOTH, INFERENCE, PLAIN, RESIDUAL, Problem

#: Where the input of ReLU is nearer to 0, rounding may put it on either side.
_KINK = {"float32": 1e-3, "bfloat16": 2**-5}


class Answer(NamedTuple):
    """One result as it should be.

    Attributes:
        values: In float64.
        largest: The largest of them, without its sign.
    """

    values: Tensor
    largest: float


class Posed(NamedTuple):
    """A problem with its numbers.

    Attributes:
        problem: What is computed.
        x: The batch.
        residual: What is added before ReLU, or None.
        dy: The gradient by y: with a mean, and not independent of x, so that every term of dx
            counts; 0 where rounding decides which side of ReLU's kink a value is on, so that all
            agree on which values count.
        weight: gamma, (C,).
        bias: beta, (C,).
        running_mean: What inference subtracts, (C,).
        running_var: What inference divides by the root of, (C,).
        answers: For each mode what comes out: y, dx, dweight, dbias, dresidual, or as many of them
            as there are.
    """

    problem: Problem
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    answers: dict[str, tuple[Answer, ...]]


def pose(problem: Problem, modes: Collection[str]) -> Posed:
    """Draw the inputs, the same ones each time, and let `torch.nn` solve the problem in float64.

    Args:
        problem: What is computed.
        modes: Those to solve it for.
    """
    generator = torch.Generator().manual_seed(0)
    shape, channels = problem.shape, problem.shape[1]
    along = (1, channels, *(1 for _ in shape[2:]))
    weight, bias, shift = (torch.randn(channels, generator=generator) for _ in range(3))
    weight, bias = 1 + 0.2 * weight, 0.2 * bias
    running_mean = shift + 0.1 * torch.randn(channels, generator=generator)
    running_var = 1 + torch.rand(channels, generator=generator)

    def draw() -> Tensor:
        drawn = torch.empty(shape, memory_format=problem.memory_format)
        return drawn.normal_(generator=generator)

    x = draw().add_(shift.view(along)).to(problem.torch_dtype)
    residual = draw().to(problem.torch_dtype) if problem.fusion == RESIDUAL else None
    dy = draw().add_(x, alpha=0.5).add_(1).to(problem.torch_dtype)

    gamma, beta = weight.double().requires_grad_(), bias.double().requires_grad_()
    exact = x.double().requires_grad_()
    added = None if residual is None else residual.double().requires_grad_()
    answers: dict[str, tuple[Answer, ...]] = {}
    if INFERENCE in modes:
        with torch.no_grad():
            z = F.batch_norm(exact, running_mean.double(), running_var.double(), gamma, beta)
            answers[INFERENCE] = _answers(_finish(z, added, problem))
    trained = set(modes) - {INFERENCE}
    if trained:
        z = F.batch_norm(exact, None, None, gamma, beta, training=True)
        y = _finish(z, added, problem)
        answers |= dict.fromkeys(trained, _answers(y))
        if BOTH in modes:
            if problem.fusion != PLAIN:
                with torch.no_grad():
                    near = (z if added is None else z + added).abs_() < _KINK[problem.dtype]
                    dy.masked_fill_(near, 0)
            leaves = [exact, gamma, beta, *([] if added is None else [added])]
            answers[BOTH] += _answers(*torch.autograd.grad(y, leaves, dy.double()))
    return Posed(problem, x, residual, dy, weight, bias, running_mean, running_var, answers)


def in_groups(posed: Posed, size: int) -> Posed:
    """Return a problem of BN + ReLU, forward and backward, with its answers in ghost batches.

    Args:
        posed: The problem.
        size: The number of examples in a group.
    """
    gamma, beta = posed.weight.double().requires_grad_(), posed.bias.double().requires_grad_()
    x, dy = posed.x.double().requires_grad_(), posed.dy.clone()
    groups = x.split(size)  # type: ignore[no-untyped-call]
    z = torch.cat([F.batch_norm(g, None, None, gamma, beta, training=True) for g in groups])
    with torch.no_grad():
        dy.masked_fill_(z.abs() < _KINK[posed.problem.dtype], 0)
    y = F.relu(z)
    gradients = torch.autograd.grad(y, [x, gamma, beta], dy.double())
    return posed._replace(dy=dy, answers={BOTH: _answers(y, *gradients)})


def _finish(z: Tensor, residual: Tensor | None, problem: Problem) -> Tensor:
    z = z if residual is None else z + residual
    return z if problem.fusion == PLAIN else F.relu(z)


def _answers(*results: Tensor) -> tuple[Answer, ...]:
    values = [result.detach() for result in results]
    return tuple(Answer(v, float(torch.linalg.vector_norm(v, math.inf))) for v in values)
