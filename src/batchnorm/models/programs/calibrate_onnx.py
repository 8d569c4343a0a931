"""Calibrating an ONNX model: its batch norms become arithmetic whose moments can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from torch import Tensor

from batchnorm.models.files import FileError
from batchnorm.models.programs.moved import Moved, ProgramReport, Statistics
from batchnorm.models.programs.onnx_norms import Norm, assign, observable
from batchnorm.models.programs.onnx_observing import observe
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from onnx import ModelProto

#: Takes the name of a layer, the statistics that it has, and the exact ones; returns the new ones.
Blend: TypeAlias = Callable[[str, Statistics, Statistics], Statistics]


def calibrate_onnx(
    model: ModelProto,
    batches: Iterable[Sequence[Tensor]],
    *,
    max_batches: int | None = None,
    hear_each: Callable[[Mapping[str, Tensor]], None] | None = None,
    blend: Blend | None = None,
) -> ProgramReport:
    """Set the statistics of an ONNX model's batch norms to the exact moments of data.

    As `batchnorm.calibrate` does, with the moments of each batch in float64, by ONNX Runtime. A
    layer that is used twice is two nodes, and each gets the moments of its own values.

    Args:
        model: The model, changed in place.
        batches: The values of the inputs, of one call after the other.
        max_batches: How many calls at most.
        hear_each: What hears, meanwhile, of each example; see `observe`.
        blend: What the statistics are set to, if not to the exact moments.

    Returns:
        What moved, and what was left, with the reason.

    Raises:
        FileError: It has no batch norms, was exported in training, or ONNX Runtime cannot run it.
    """
    wanted, left = observable(model)
    if not wanted and not left:
        raise FileError(
            "it has no batch norm; folded ones are gone, and torch.onnx.export folds what follows "
            "a convolution, unless optimize=False"
        )
    report, totals = ProgramReport(left=left), dict[str, Moments]()

    def add(name: str, found: Moments) -> None:
        totals[name] = totals[name] + found if name in totals else found

    report.batches = observe(
        model, wanted, batches, "calibrating", max_batches=max_batches, hear_moments=add,
        hear_each=hear_each,
    )  # fmt: skip
    if report.batches == 0:
        raise FileError("there are no batches to calibrate with")
    for norm in wanted:
        _assign(model, norm, totals.get(norm.name), report, blend)
    return report


def _assign(
    model: ModelProto, norm: Norm, total: Moments | None, report: ProgramReport, blend: Blend | None
) -> None:
    """Give a node statistics of its own, if there are any."""
    if total is None:
        report.left[norm.name] = "no batch was finite"
        return
    if not total.count > 1:
        report.left[norm.name] = "it saw one value a channel, which has no variance"
        return
    assert norm.arrays is not None  # or else it is not observed
    exact, before = (total.mean, total.var(correction=1)), norm.statistics
    if blend is not None:
        exact = blend(norm.name, before, exact)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is told
        found = [v.numpy().astype(old.dtype) for v, old in zip(exact, norm.arrays, strict=True)]
    for kind, values in zip(("mean", "variance"), found, strict=True):
        if not np.isfinite(values).all():
            report.left[norm.name] = f"its {kind} does not fit {values.dtype.name}"
            return
    assign(model, norm, found)
    report.moved[norm.name] = Moved.between(int(total.count), before, exact)
    report.done.append(norm.name)
