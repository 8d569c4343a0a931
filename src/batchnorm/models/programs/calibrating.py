"""Calibrating an exported model, of either kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.models.files import Model
from batchnorm.models.programs.calibrate_onnx import calibrate_onnx
from batchnorm.models.programs.calibrate_program import calibrate_program
from batchnorm.models.programs.layered import statistics_of_program
from batchnorm.models.programs.moved import ProgramReport, Statistics
from batchnorm.models.programs.onnx_norms import statistics_of_onnx
from batchnorm.models.programs.running import calls_of


def calibrate_model(
    model: Model, values: Sequence[Tensor], size: int, max_batches: int | None = None
) -> ProgramReport:
    """Set the statistics of a model's batch norms to the exact moments of data.

    Args:
        model: A program of `torch.export`, or an ONNX model; changed in place.
        values: The data, of each input all examples.
        size: How many examples go into a call. Where the model takes no other number, those that
            are left at the end are not used.
        max_batches: How many calls at most.

    Returns:
        What moved, and what was left, with the reason.

    Raises:
        FileError: The model cannot be calibrated, or there are fewer examples than it takes.
    """
    calls, unused = calls_of(model, values, size)
    if isinstance(model, torch.export.ExportedProgram):
        report = calibrate_program(model, calls, max_batches=max_batches)
    else:
        report = calibrate_onnx(model, calls, max_batches=max_batches)
    report.unused = unused
    return report


def same_statistics(model: Model, other: Model) -> bool:
    """Return whether the statistics of two models are the same numbers."""
    ours, theirs = statistics_of(model), statistics_of(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name][at], theirs[name][at]) for name in ours for at in (0, 1)
    )


def statistics_of(model: Model) -> dict[str, Statistics]:
    """Return the mean and the variance of each batch norm of a model that has them."""
    if isinstance(model, torch.export.ExportedProgram):
        return statistics_of_program(model)
    return statistics_of_onnx(model)
