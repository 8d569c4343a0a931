"""What takes part in a bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from batchnorm.bench.cases import BOTH, INFERENCE, Case
from batchnorm.bench.problem import Answer, Posed


class Step(NamedTuple):
    """What is timed, and how to read what it returns.

    Attributes:
        call: Does all of it, and returns all results.
        read: Returns them as tensors in the shape of the batch: y, or y, dx, dweight, dbias and,
            where there is a residual, dresidual.
        answers: What they should be, where that is not what the problem says.
    """

    call: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, ...]] = tuple
    answers: tuple[Answer, ...] | None = None


class Contender(Protocol):
    """A way to compute batch normalization, built as its users write it."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def ours(self) -> bool:
        """Whether it must be exact."""

    def missing(self) -> str | None:
        """Return why it cannot take part here, or None if it can."""

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed; the first call may take longer."""


def step_of(module: nn.Module, case: Case, posed: Posed) -> Step:
    """Return the step of a module that is called with x, and the residual where there is one.

    The module is put into the mode of the case. Backward, the gradients are those of the batch,
    of the parameters and of the residual.
    """
    module.train(case.mode != INFERENCE)
    if case.mode != BOTH:
        inputs = [posed.x] if posed.residual is None else [posed.x, posed.residual]
        return Step(torch.no_grad()(lambda: (module(*inputs),)))
    inputs = [t.detach().requires_grad_() for t in (posed.x, posed.residual) if t is not None]
    leaves = [inputs[0], *module.parameters(), *inputs[1:]]

    def both() -> tuple[Tensor, ...]:
        y = module(*inputs)
        return y, *torch.autograd.grad(y, leaves, posed.dy)

    return Step(both)


def fill(layer: nn.modules.batchnorm._BatchNorm, posed: Posed) -> None:
    """Give a layer the parameters and the running statistics of a problem."""
    names = ("weight", "bias", "running_mean", "running_var")
    layer.load_state_dict({name: getattr(posed, name) for name in names}, strict=False)
