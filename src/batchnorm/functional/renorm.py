"""Batch renormalization: the correction of a batch's moments towards the running ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.functional import operators
from batchnorm.functional.surroundings import is_compiling, is_transformed
from batchnorm.kernels.steps import Correction


class Renorm(NamedTuple):
    """What batch renormalization corrects towards, and how far.

        r = clip(std / running_std, 1 / r_max, r_max)
        d = clip((mean - running_mean) / running_std, -d_max, d_max)
        xhat = (x - mean) / std * r + d

    Within the limits xhat is what the running statistics would give, but the gradient still flows
    through the moments of the batch, as if r and d were constants.

    Attributes:
        running_mean: (C,), before the batch moves it.
        running_var: (C,), likewise.
        r_max: At least 1: a number, or a scalar tensor where a schedule gives it.
        d_max: At least 0: likewise.
        eps: Added to the running variance, in its unit.

    Source:
        Ioffe, Batch Renormalization, 2017, algorithm 1 (arXiv:1702.03275).
    """

    running_mean: Tensor
    running_var: Tensor
    r_max: Tensor | float
    d_max: Tensor | float
    eps: float

    def correction(self, mean: Tensor, inverse_std: Tensor) -> Correction:
        """Return r and d of a batch with that mean and 1 / std."""
        mean, inverse_std, running_mean, running_var = (  # in forward mode, too, all are constants
            v.detach() for v in (mean, inverse_std, self.running_mean, self.running_var)
        )
        inverse_running = (running_var.to(mean.dtype) + self.eps).rsqrt()
        there = inverse_std > 0  # and not a batch without values
        r = torch.where(there, inverse_running / inverse_std, 1)
        d = torch.where(there, (mean - running_mean) * inverse_running, 0)
        r_max, d_max = (  # a number is filled in: to copy it to a device would wait for that
            v.to(mean.dtype) if isinstance(v, Tensor) else mean.new_full((), v)
            for v in (self.r_max, self.d_max)
        )
        r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        if is_compiling() and not is_transformed():
            # the backward pass would compute them anew, of buffers that have moved by then
            r, d = operators.snapshot(r), operators.snapshot(d)
        return Correction(r, d)
