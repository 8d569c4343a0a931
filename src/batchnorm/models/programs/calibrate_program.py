"""Calibrating a program of `torch.export`: meanwhile its batch norms are layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from batchnorm.models.calibrate import calibrate
from batchnorm.models.files import FileError
from batchnorm.models.programs.layered import LayeredProgram
from batchnorm.models.programs.moved import Moved, ProgramReport

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def calibrate_program(
    program: ExportedProgram,
    batches: Iterable[Sequence[Tensor]],
    *,
    max_batches: int | None = None,
) -> ProgramReport:
    """Set the statistics of a program's batch norms to the exact moments of data.

    As `batchnorm.calibrate` does: each layer is normalized by the moments of its batch, and those
    of all batches merge exactly.

    Args:
        program: The program, exported in evaluation; changed in place.
        batches: The values of the inputs, of one call after the other.
        max_batches: How many calls at most.

    Returns:
        What moved, and what was left, with the reason.

    Raises:
        FileError: It has no batch norms, or was exported in training.
    """
    made = LayeredProgram(program)
    if not made.layers and not made.left:
        raise FileError("it has no batch norm; folded ones are gone")
    done = calibrate(
        made, batches, call=lambda module, values: module(values), max_batches=max_batches
    )
    report = ProgramReport(left={**made.left, **done.left}, batches=done.batches)
    for name in done.done:
        moved = Moved.between(made.values[name], made.kept(name), made.statistics(name))
        reason = made.assign(name)
        if reason is not None:
            report.left[name] = reason
            continue
        report.done.append(name)
        report.moved[name] = moved
    return report
