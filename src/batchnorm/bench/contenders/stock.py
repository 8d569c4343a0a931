"""`torch.nn`, called as it is, and compiled."""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor, nn

from batchnorm.bench.cases import PLAIN, Case
from batchnorm.bench.contenders.contender import Step, fill, step_of
from batchnorm.bench.problem import Posed

_LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Block(nn.Module):
    """BN, + residual, ReLU: what can be done in place is, as in torchvision's ResNet."""

    def __init__(self, posed: Posed) -> None:
        super().__init__()
        shape = posed.problem.shape
        self.norm = _LAYERS[len(shape)](shape[1])
        self.relu = posed.problem.fusion != PLAIN
        fill(self.norm, posed)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return y."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y += residual
        return torch.relu_(y) if self.relu else y


class Stock:
    """`torch.nn` as it is."""

    name, ours = "torch.nn", False

    def missing(self) -> str | None:
        """Return None: it is always there."""
        return None

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed."""
        return step_of(Block(posed), case, posed)


class Compiled:
    """The same, under `torch.compile`, compiled anew for each case."""

    name, ours = "torch.compile", False

    def missing(self) -> str | None:
        """Return whether there is no compiler that it could call."""
        compiler = os.environ.get("CXX", "g++")
        if any(shutil.which(name) for name in (compiler, "clang++", "cl")):
            return None
        return f"it needs a C++ compiler, and there is no {compiler}"

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed; the first call compiles."""
        torch.compiler.reset()
        compiled: nn.Module = torch.compile(Block(posed), fullgraph=True)  # type: ignore[assignment]
        return step_of(compiled, case, posed)
