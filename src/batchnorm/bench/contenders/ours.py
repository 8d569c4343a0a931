"""Our layer, on each of its backends, and its kernels alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.cases import PLAIN, Case
from batchnorm.bench.contenders.contender import Step, fill, step_of
from batchnorm.bench.errors import BenchError
from batchnorm.bench.problem import Posed, in_groups
from batchnorm.kernels import Activation, Form, choose, native
from batchnorm.kernels.contract import Given

#: The number of examples in a ghost batch.
GHOST_SIZE = 16

_LAYERS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def _layer(posed: Posed, ghost_size: int | None = None) -> bn.BatchNorm:
    shape = posed.problem.shape
    activation = None if posed.problem.fusion == PLAIN else "relu"
    layer = _LAYERS[len(shape)](shape[1], activation=activation, ghost_size=ghost_size)
    fill(layer, posed)
    return layer


def _reason(name: str) -> str | None:
    (found,) = (backend for backend in bn.backends() if backend.name == name)
    return found.available()


class Native:
    """Our layer as it is, which must run in C++."""

    name, ours = "native", True

    def missing(self) -> str | None:
        """Return why the kernels are not there, or None if they are."""
        return _reason("native")

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed.

        Raises:
            BenchError: Another backend would serve.
        """
        serving = choose(posed.x, Form()).name
        if serving != "native":
            raise BenchError(f"{case}: native is to be timed, and {serving} would serve the call")
        return step_of(_layer(posed), case, posed)


class Ghost:
    """Our layer in ghost batches, which must run in C++: compared with `Native`."""

    name, ours = f"native, ghost {GHOST_SIZE}", True

    def missing(self) -> str | None:
        """Return why the kernels are not there, or None if they are."""
        return _reason("native")

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed: BN + ReLU, forward and backward."""
        own = in_groups(posed, GHOST_SIZE)
        step = step_of(_layer(own, GHOST_SIZE), case, own)
        return Step(step.call, step.read, own.answers[case.mode])


class _Forced(nn.Module):
    """Our layer on a backend of choice."""

    def __init__(self, layer: nn.Module, backend: str) -> None:
        super().__init__()
        self.layer, self.backend = layer, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        with bn.backend(self.backend):
            y: Tensor = self.layer(x, residual)
        return y


class Eager:
    """Our layer made of PyTorch operations."""

    name, ours = "eager", True

    def missing(self) -> str | None:
        """Return None: it is always there."""
        return _reason("eager")

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed."""
        return step_of(_Forced(_layer(posed), "eager"), case, posed)


class Mapped:
    """The kernels of `native` alone, forward and backward, into memory that is there already.

    What this saves beside `native` is what new memory costs, autograd, and the running statistics.
    """

    name, ours = "native, mapped", True

    def missing(self) -> str | None:
        """Return why the kernels are not there, or None if they are."""
        return _reason("native")

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed: BN + ReLU, forward and backward."""
        x, dy, weight, bias = posed.x, posed.dy, posed.weight, posed.bias
        form = Form(activation=Activation.parse("relu"))
        batch = native._seen(x, form)
        y, dx = (native.output_like(x, batch) for _ in range(2))
        mean, inverse_std, m2 = (torch.empty_like(weight, dtype=torch.float64) for _ in range(3))
        sums = [torch.empty_like(weight), torch.empty_like(bias)]
        given = Given(x, mean, inverse_std, weight, bias, None, None, form)
        counts = [x.numel() / len(weight)]

        def both() -> tuple[Tensor, ...]:
            statistics = (mean, inverse_std, m2)
            native._forward(batch, x, y, weight, bias, None, None, statistics, None)
            native._backward(batch, dy, given, dx, None, None, counts, True, *sums)
            return y, dx, *sums

        return Step(both)
