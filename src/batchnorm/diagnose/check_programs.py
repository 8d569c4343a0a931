"""The doctor for exported models: programs of `torch.export`, and ONNX models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from batchnorm.diagnose.check import (
    age,
    batches,
    channels,
    neighbours,
    padding,
    report_of,
    settings,
)
from batchnorm.diagnose.check.finding import Finding
from batchnorm.diagnose.check.known import Known, kinds
from batchnorm.diagnose.check.report import HealthReport
from batchnorm.diagnose.check.spread import Spread
from batchnorm.diagnose.check_files import CALIBRATE, of_onnx, of_program
from batchnorm.diagnose.programs import told
from batchnorm.models.files import Model
from batchnorm.models.programs.running import calls_of

_Check = Callable[[Known], Iterator[Finding]]

#: What holds of a file. It is not trained: momentum, decay and the size of batches are past.
_CHECKS = (age.find, settings.find, channels.find, padding.find, neighbours.find)
#: Of data that are sorted: what takes batches in their order would go wrong.
_SHUFFLE = "data = data[numpy.random.default_rng(0).permutation(len(data))]"
_VALUES = 64  # of an example, evenly over it, that tell whether they are
#: What removes a fault where that is another thing than for a module.
_FIXES = {
    "non_finite_statistics": CALIBRATE,
    "batch_dependent_evaluation": "train it with track_running_stats=True, and export it again",
    "non_finite_input": "find what overflows before the layer, and export it in float32",
}


def check_model(
    model: Model,
    values: Sequence[Tensor],
    size: int,
    *,
    labels: Tensor | None = None,
    max_batches: int | None = None,
) -> HealthReport:
    """Say what is wrong with the batch norms of an exported model, as `batchnorm.check` does.

    Of how it was trained a file knows little: nothing is said of momentum, of the size of batches,
    or of what was frozen. The data are shuffled, as they were in training; if they were sorted,
    that is a note, since `calibrate` takes them in their order.

    Args:
        model: A program of `torch.export`, or an ONNX model; it stays as it is.
        values: The data, of each input all examples.
        size: How many examples go into a call; see `calls_of`.
        labels: One integer for each example.
        max_batches: How many calls at most.

    Returns:
        The findings. A fix is a command for the file, or a line of Python for the module, to be
        exported again.

    Raises:
        FileError: The model has no batch norm, or cannot be run; or there are too few examples.
    """
    order = torch.randperm(len(values[0]), generator=torch.Generator().manual_seed(0))
    calls, _ = calls_of(model, [value[order] for value in values], size)
    labelled = None if labels is None else torch.split(labels[order], size)
    with told():
        if isinstance(model, torch.export.ExportedProgram):
            known, left = of_program(model, calls, labelled, max_batches)
        else:
            known, left = of_onnx(model, calls, labelled, max_batches)

    def left_out(_: Known) -> Iterator[Finding]:
        for name, why in left.items():
            if name not in known.layers:
                yield Finding(
                    "not_checked",
                    "note",
                    name,
                    why,
                    "what cannot be read cannot be compared with data",
                    "bn.check(model, data)  # in Python, of the module",
                )

    report = report_of(known, [*map(_for_a_file, _CHECKS), left_out])
    report.findings += _sorted(values[0], labels, size)  # which explains nothing of the others
    return report


def _sorted(values: Tensor, labels: Tensor | None, size: int) -> list[Finding]:
    """Return a note where examples are sorted, by some of their values or by their labels."""
    of_values, of_labels = Spread(), Spread()
    for batch in torch.split(values, size):
        each = batch.flatten(1) if batch.ndim > 1 else batch[:, None]
        step = max(each.shape[1] // _VALUES, 1)
        of_values.add(each[:, ::step].to(torch.promote_types(each.dtype, torch.float32)))
    for own in () if labels is None else torch.split(labels, size):
        of_labels.add(kinds(own))
    if not (batches.is_sorted(of_values) or batches.is_sorted(of_labels)):
        return []
    found = batches.of_sorted("", of_values, of_labels)
    return [replace(found, severity="note", fix=_SHUFFLE)]


def _for_a_file(find: _Check) -> _Check:
    """Return a check whose fixes are for a file."""

    def found(known: Known) -> Iterator[Finding]:
        for finding in find(known):
            yield replace(finding, fix=_FIXES.get(finding.code) or _fix(finding.fix))

    return found


def _fix(fix: str) -> str:
    if fix == CALIBRATE:
        return fix
    return f"{fix}{';' if '#' in fix else '  #'} in Python; then export it again"
