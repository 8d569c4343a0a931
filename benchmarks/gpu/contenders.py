"""What takes part on a GPU: `torch.nn`, the compilers and ours, each as its users write it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.cases import Case
from batchnorm.bench.contenders import Step
from batchnorm.bench.contenders.contender import fill, step_of
from batchnorm.bench.contenders.jitted import _function, _jax, _ordered, _to_numpy, _to_torch
from batchnorm.bench.contenders.stock import Block, Compiled
from batchnorm.bench.errors import BenchError
from batchnorm.bench.problem import Posed
from batchnorm.kernels import Form, choose

#: The backend that must serve on a GPU.
BACKEND = "triton"

Make = Callable[[Posed], nn.Module]


class Contender(Protocol):
    """A way to compute batch normalization on a device."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def ours(self) -> bool:
        """Whether it must be exact."""

    @property
    def is_captured(self) -> bool:
        """Whether it is timed as a CUDA graph, too."""

    @property
    def is_on_stream(self) -> bool:
        """Whether CUDA events of torch can time it; else a call returns when all is done."""

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot take part here, or None if it can."""

    def steps(self, case: Case, sets: Sequence[Posed]) -> list[Step]:
        """Return what is timed, with each set of inputs; the first call may take longer."""


@dataclass(frozen=True)
class Module:
    """A module of torch.

    Attributes:
        name: What it is called in the results.
        make: Returns the module for a problem.
        why_missing: Returns why it cannot take part on a device, or None if it can.
        ours: Whether it must be exact.
        is_captured: Whether it is timed as a CUDA graph, too.
    """

    name: str
    make: Make
    why_missing: Callable[[torch.device], str | None] = lambda _: None
    ours: bool = False
    is_captured: bool = True
    is_on_stream = True

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot take part here, or None if it can."""
        return self.why_missing(device)

    def steps(self, case: Case, sets: Sequence[Posed]) -> list[Step]:
        """Return what is timed, with each set of inputs."""
        module = self.make(sets[0])
        return [step_of(module, case, posed) for posed in sets]


def _stock(posed: Posed) -> nn.Module:
    return Block(posed).to(posed.x.device)


class _WithoutCudnn(nn.Module):
    """A module run by the kernels of torch itself; backward they are those of the forward pass."""

    def __init__(self, posed: Posed) -> None:
        super().__init__()
        self.block = _stock(posed)

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            y: Tensor = self.block(*inputs)
        return y


def _compiled(posed: Posed) -> nn.Module:
    torch.compiler.reset()
    compiled: Any = torch.compile(_stock(posed), fullgraph=True)
    assert isinstance(compiled, nn.Module)
    return compiled


def _no_compiler(device: torch.device) -> str | None:
    if device.type != "cuda":
        return Compiled().missing()
    return None if importlib.util.find_spec("triton") else "it needs Triton, which is not installed"


def _no_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "cuDNN is for GPUs"


def _no_backend(device: torch.device) -> str | None:
    (found,) = (backend for backend in bn.backends() if backend.name == BACKEND)
    reason = found.available() if device.type == "cuda" else None
    return None if reason is None else f"the backend {BACKEND} cannot run: {reason}"


def _ours(posed: Posed) -> nn.Module:
    serving = choose(posed.x, Form()).name
    if posed.x.is_cuda and serving != BACKEND:
        raise BenchError(f"{BACKEND} is to be timed, and {serving} would serve the call")
    layer = bn.BatchNorm2d(len(posed.weight), activation="relu")
    fill(layer, posed)
    return layer.to(posed.x.device)


class Jitted:
    """JAX, with the formula of the bench on a CPU.

    Its work is not on torch's stream, so that the clock of the CPU takes its time.
    """

    name, ours, is_captured, is_on_stream = "jax", False, False, False

    def missing(self, device: torch.device) -> str | None:
        """Return whether JAX is not installed, or does not see the device."""
        if importlib.util.find_spec("jax") is None:
            return 'jax is not installed: pip install "jax[cuda13]"'
        try:
            self._device(device, torch.get_num_threads())
        except Exception as error:  # JAX raises many kinds, and the others can do without it
            return f"jax cannot use the device: {error}"
        return None

    def steps(self, case: Case, sets: Sequence[Posed]) -> list[Step]:
        """Return what is timed, with each set of inputs."""
        jax, device = self._device(sets[0].x.device, case.threads)
        jax.clear_caches()
        last = case.problem.channels_last
        compute = jax.jit(_function(case, 3 if last else 1))

        def read(result: Any) -> tuple[Tensor, ...]:
            tensors = [_to_torch(array) for array in result[0] if array is not None]
            return tuple(t.movedim(-1, 1) if last and t.ndim > 1 else t for t in tensors)

        def step(posed: Posed) -> Step:
            batches = [_ordered(t, last) for t in (posed.x, posed.dy, posed.residual)]
            channels = [posed.weight, posed.bias, posed.running_mean, posed.running_var]
            given = [
                None if t is None else jax.device_put(_to_numpy(t.cpu()), device)
                for t in [*batches, *channels]
            ]
            return Step(lambda: jax.block_until_ready(compute(*given)), read)

        return [step(posed) for posed in sets]

    @staticmethod
    def _device(device: torch.device, threads: int) -> tuple[Any, Any]:
        # or else JAX takes three quarters of the GPU's memory when it is first used
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        jax = _jax(threads)
        return jax, jax.devices("gpu" if device.type == "cuda" else "cpu")[0]


#: What all are compared with.
BASE: Contender = Module("torch.nn", _stock)
OURS: Contender = Module("batchnorm", _ours, _no_backend, ours=True)
#: By their names on the command line.
PEERS: dict[str, Contender] = {
    "no-cudnn": Module("torch.nn, no cuDNN", _WithoutCudnn, _no_gpu, is_captured=False),
    "compile": Module("torch.compile", _compiled, _no_compiler),
    "jax": Jitted(),
}
