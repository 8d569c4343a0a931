"""Inputs on the device, the right answers in float64, and whether a result is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.bench.cases import BOTH, INFERENCE, RESIDUAL, Case
from batchnorm.bench.check import BOUNDS
from batchnorm.bench.errors import WrongResult
from batchnorm.bench.problem import _KINK, Answer, Posed
from benchmarks.gpu.cases import title

#: Values of which float64 is made at a time.
_PIECE = 2**26
_NAMES = ("y", "dx", "dweight", "dbias", "dresidual")


def pose(case: Case, device: torch.device) -> Posed:
    """Draw the inputs of a case, the same ones each time, and let `torch.nn` solve it in float64.

    Args:
        case: What is computed; ReLU is a part of it.
        device: Where the numbers are.
    """
    problem = case.problem
    generator = torch.Generator(device).manual_seed(0)
    channels = problem.shape[1]

    def numbers() -> Tensor:
        return torch.randn(channels, generator=generator, device=device)

    def draw() -> Tensor:
        drawn = torch.empty(problem.shape, device=device, memory_format=problem.memory_format)
        return drawn.normal_(generator=generator)

    shift = numbers()
    x = draw().add_(shift.view(-1, 1, 1)).to(problem.torch_dtype)
    posed = Posed(
        problem,
        x,
        draw().to(problem.torch_dtype) if problem.fusion == RESIDUAL else None,
        draw().add_(x, alpha=0.5).add_(1).to(problem.torch_dtype),
        weight=1 + 0.2 * numbers(),
        bias=0.2 * numbers(),
        running_mean=shift + 0.1 * numbers(),
        running_var=1 + torch.rand(channels, generator=generator, device=device),
        answers={},
    )
    posed.answers[case.mode] = _solve(posed, case.mode)
    return posed


def _solve(posed: Posed, mode: str) -> tuple[Answer, ...]:
    """Return the right results; the gradient by y becomes 0 where rounding decides on ReLU."""
    x, channels = posed.x, len(posed.weight)
    step = max(1, _PIECE * channels // x.numel())
    batches = [torch.empty_like(x, dtype=torch.float64)]
    if mode == BOTH:
        batches += [torch.empty_like(batches[0]) for t in (x, posed.residual) if t is not None]
    sums: list[tuple[Tensor, Tensor]] = []
    for first in range(0, channels, step):
        own = slice(first, first + step)
        found = _solve_channels(posed, mode, own)
        if mode == BOTH:
            y, dx, dweight, dbias, *rest = found
            sums.append((dweight, dbias))
            found = [y, dx, *rest]
        for whole, part in zip(batches, found, strict=True):
            whole[:, own] = part
    results = batches[:2] + [torch.cat(parts) for parts in zip(*sums, strict=True)] + batches[2:]
    return tuple(Answer(v, _largest(v)) for v in results)


def _solve_channels(posed: Posed, mode: str, own: slice) -> list[Tensor]:
    given = [posed.x, *([] if posed.residual is None else [posed.residual])]
    batches = [t[:, own].contiguous().double().requires_grad_() for t in given]
    weight, bias = (t[own].double().requires_grad_() for t in (posed.weight, posed.bias))
    mean, var = (t[own].double() for t in (posed.running_mean, posed.running_var))
    with torch.backends.cudnn.flags(enabled=False), torch.set_grad_enabled(mode == BOTH):
        if mode == INFERENCE:
            z = F.batch_norm(batches[0], mean, var, weight, bias)
        else:
            z = F.batch_norm(batches[0], None, None, weight, bias, training=True)
        z = z + batches[1] if len(batches) > 1 else z
        y = F.relu(z)
    if mode != BOTH:
        return [y]
    near = z.detach().abs() < _KINK[posed.problem.dtype]
    dy = posed.dy[:, own].masked_fill_(near, 0)  # a view: the gradient that all are given
    leaves = [batches[0], weight, bias, *batches[1:]]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.contiguous().double())]


def check(name: str, ours: bool, case: Case, found: Sequence[Tensor], posed: Posed) -> float:
    """Return the largest error of all results, relative to the largest value of each.

    Args:
        name: Whose they are.
        ours: Whether the narrow bound holds for them.
        case: What was computed.
        found: The results.
        posed: The inputs, with the answers.

    Raises:
        WrongResult: One is off by more than the bound, or not a number.
    """
    bound = BOUNDS[case.problem.dtype][ours]
    errors = [relative_error(*pair) for pair in zip(found, posed.answers[case.mode], strict=True)]
    for what, error in zip(_NAMES, errors, strict=False):
        if not error <= bound:
            raise WrongResult(
                f"{name} is wrong: its {what} is off by {error:.2g} of the largest value, at most "
                f"{bound:.2g} is allowed ({title(case)}); no time is taken of it"
            )
    return max(errors)


def relative_error(found: Tensor, answer: Answer) -> float:
    """Return the largest error relative to the largest value expected; NaN where there is one.

    Raises:
        WrongResult: The shapes differ.
    """
    expected = answer.values
    if found.shape != expected.shape:
        raise WrongResult(f"a result has the shape {tuple(found.shape)}, not {expected.shape}")
    step = max(1, _PIECE * len(expected) // expected.numel())
    errors = []
    for first in range(0, len(expected), step):
        own = slice(first, first + step)
        part = found[own].detach().to(expected.device, torch.float64)
        errors.append((part - expected[own]).abs_().amax())
    return float(torch.stack(errors).amax() / answer.largest)


def _largest(values: Tensor) -> float:
    return float(torch.maximum(values.amax(), -values.amin()))


def copies(posed: Posed, mode: str, cache: int) -> list[Posed]:
    """Return the problem as often as it takes to be three times as large as the cache.

    Then what a call reads is not in the cache yet, as in a network, where other layers came
    between.

    Args:
        posed: The problem, which is the first of them.
        mode: What is timed.
        cache: The bytes of the last cache.
    """
    read = [posed.x, posed.residual, posed.dy if mode == BOTH else None]
    size = sum(t.nbytes for t in read if t is not None)
    return [posed, *(_copy(posed) for _ in range(-(-3 * cache // size) - 1))]


def _copy(posed: Posed) -> Posed:
    residual = None if posed.residual is None else posed.residual.clone()
    return posed._replace(x=posed.x.clone(), dy=posed.dy.clone(), residual=residual)
