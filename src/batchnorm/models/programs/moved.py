"""What calibrating an exported model moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from batchnorm.models.calibrate import CalibrationReport

#: The mean and the variance of each channel.
Statistics: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Moved:
    """The statistics of a layer, before and after.

    Attributes:
        values: How many values a channel the new ones are of.
        mean: The means, before and after, averaged over the channels.
        var: The variances, likewise.
        change: The largest change of a channel: that of its mean in standard deviations, or of its
            variance relative to it, as both were before.
    """

    values: int
    mean: tuple[float, float]
    var: tuple[float, float]
    change: float

    @classmethod
    def between(cls, values: int, before: Statistics, after: Statistics) -> Moved:
        """Return what moved between two pairs of mean and variance."""
        (mean, var), (mean_after, var_after) = (
            tuple(v.detach().to(torch.float64) for v in pair) for pair in (before, after)
        )
        least = var.clamp(min=torch.finfo(torch.float32).tiny)
        changes = (mean_after - mean).abs() / least.sqrt(), (var_after - var).abs() / least
        return cls(
            values,
            (float(mean.mean()), float(mean_after.mean())),
            (float(var.mean()), float(var_after.mean())),
            float(torch.cat(changes).max()),
        )


@dataclass(repr=False)
class ProgramReport(CalibrationReport):
    """Which layers of an exported model were calibrated, and what that moved.

    Attributes:
        moved: What moved, by the name of the layer.
        unused: How many examples at the end of the data were too few for a call.
    """

    moved: dict[str, Moved] = field(default_factory=dict)
    unused: int = 0
