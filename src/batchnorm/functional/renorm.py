"""Batch renormalization: the correction of a batch's moments towards the running ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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

    @torch.no_grad()
    def correction(self, mean: Tensor, inverse_std: Tensor) -> Correction:
        """Return r and d of a batch with that mean and 1 / std."""
        inverse_running = (self.running_var.to(mean.dtype) + self.eps).rsqrt()
        there = inverse_std > 0  # and not a batch without values
        r = torch.where(there, inverse_running / inverse_std, 1)
        d = torch.where(there, (mean - self.running_mean) * inverse_running, 0)
        r_max = torch.as_tensor(self.r_max, dtype=mean.dtype, device=mean.device)
        d_max = torch.as_tensor(self.d_max, dtype=mean.dtype, device=mean.device)
        return Correction(r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max))
