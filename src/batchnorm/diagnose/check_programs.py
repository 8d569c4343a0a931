"""The doctor for exported models: programs of `torch.export`, and ONNX models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
from batchnorm.diagnose.check.known import Known
from batchnorm.diagnose.check.look import look
from batchnorm.diagnose.check.report import HealthReport
from batchnorm.diagnose.check.seen import SeenByLayer
from batchnorm.diagnose.observe import Seen
from batchnorm.diagnose.programs import check_there, told
from batchnorm.layers import BatchNorm
from batchnorm.models.batches import limited, progress_bar
from batchnorm.models.files import Model
from batchnorm.models.programs.layered import LayeredProgram, norms
from batchnorm.models.programs.moved import Statistics
from batchnorm.models.programs.onnx_norms import observable
from batchnorm.models.programs.onnx_twice import Twice
from batchnorm.models.programs.running import calls_of

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

_Calls = Sequence[tuple[Tensor, ...]]
_Labels = Sequence[Tensor] | None

#: What takes the statistics of a file anew.
CALIBRATE = "batchnorm calibrate MODEL DATA -o OUT"
#: What holds of a file. It is not trained: momentum, decay and the size of batches are past.
_CHECKS = (
    age.find,
    settings.find,
    channels.find,
    batches.unshuffled,
    padding.find,
    neighbours.find,
)
#: What removes a fault where that is another thing than for a module.
_FIXES = {
    "non_finite_statistics": CALIBRATE,
    "unshuffled_batches": "data = data[numpy.random.default_rng(0).permutation(len(data))]",
    "batch_dependent_evaluation": "train it with track_running_stats=True, and export it again",
    "non_finite_input": "find what overflows before the layer, and export it in float32",
}


class _InAFile(Known):
    """What is known of an exported model, whose layers have the names of the module's."""

    def spelled(self, name: str) -> str:
        return f"model.get_submodule({name!r})" if name else "model"

    def recalibrated(self, name: str) -> str:
        return CALIBRATE

    def is_ours(self, name: str) -> bool:
        return False  # that is not known


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
    or of what was frozen.

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
    calls, _ = calls_of(model, values, size)
    labelled = None if labels is None else torch.split(labels, size)
    with told():
        if isinstance(model, torch.export.ExportedProgram):
            known, left = _of_program(model, calls, labelled, max_batches)
        else:
            known, left = _of_onnx(model, calls, labelled, max_batches)

    def left_out(_: Known) -> Iterator[Finding]:
        for name, why in left.items():
            if name not in known.layers:
                yield Finding(
                    "not_checked",
                    "note",
                    name,
                    why,
                    "what cannot be read cannot be compared with data",
                    "bn.check(model, data)",
                )

    return report_of(known, [_for_a_file(find) for find in (*_CHECKS, left_out)])


def _for_a_file(find: Any) -> Any:
    """Return a check whose fixes are for a file."""

    def found(known: Known) -> Iterator[Finding]:
        for finding in find(known):
            yield replace(finding, fix=_FIXES.get(finding.code) or _fix(finding.fix))

    return found


def _fix(fix: str) -> str:
    if fix == CALIBRATE:
        return fix
    return f"{fix}{';' if '#' in fix else '  #'} in Python; then export it again"


def _of_program(
    program: ExportedProgram, calls: _Calls, labels: _Labels, max_batches: int | None
) -> tuple[Known, dict[str, str]]:
    made = LayeredProgram(program)
    check_there(made.layers, made.left)
    known = _InAFile(made, dict(made.layers))
    pairs: list[dict[str, Any]] = [{"values": call} for call in calls]
    for pair, own in zip(pairs, labels or (), strict=False):
        pair["labels"] = own
    look(known, pairs, lambda model, pair: model(pair["values"]), max_batches, True)
    known.neighbours.biases.clear()  # which folding takes in

    def part(name: str, kind: str) -> Tensor | None:
        found: Tensor | None = program.state_dict.get(f"{name}.{kind}".removeprefix("."))
        return found

    for norm in norms(program.module(check_guards=False)):
        if norm.name in made.layers:
            affine = part(norm.name, "weight"), part(norm.name, "bias")
            known.layers[norm.name] = _layer(
                made.kept(norm.name), affine, norm.eps, norm.momentum,
                part(norm.name, "num_batches_tracked"),
            )  # fmt: skip
        elif not norm.tracked:
            known.layers[norm.name] = nn.BatchNorm1d(
                1, norm.eps, affine=False, track_running_stats=False
            )
    return known, made.left


def _of_onnx(
    model: ModelProto, calls: _Calls, labels: _Labels, max_batches: int | None
) -> tuple[Known, dict[str, str]]:
    found, left = observable(model)
    check_there(found, left)
    layers: dict[str, _BatchNorm] = {}
    for norm in found:
        assert norm.arrays is not None  # or else it is not observable
        mean, var = map(_tensor, norm.arrays)
        affine = (None, None) if norm.affine is None else tuple(map(_tensor, norm.affine))
        layers[norm.name] = _layer((mean, var), affine, norm.eps, norm.momentum, None)
    known, twice = _InAFile(nn.Module(), layers), Twice(model, found)
    with progress_bar("checking", calls, max_batches, 1, True) as advance:
        for at, call in enumerate(limited(calls, max_batches)):
            outputs, got = twice.evaluation(call)
            for name, x in got.items():
                known.seen.setdefault(name, SeenByLayer()).add(Seen(x, 1, None), len(call[0]), True)
            known.add(outputs, twice.by_batch(call), None if labels is None else labels[at])
            advance()
    return known, left


def _layer(
    statistics: Statistics,
    affine: Sequence[Tensor | None],
    eps: float,
    momentum: float,
    tracked: Tensor | None,
) -> BatchNorm:
    """Return a layer with what a file has, in its own types.

    An exporter writes a momentum even where there was none: what is usual is taken then, and how
    much of the start is left by so many batches is not known.
    """
    mean, var = statistics
    is_known = 0 < momentum < 1
    layer = BatchNorm(len(mean), eps, momentum if is_known else 0.1, affine=False, update="never")
    layer.running_mean, layer.running_var = mean, var
    layer.num_batches_tracked = tracked if is_known else None
    for kind, values in zip(("weight", "bias"), affine, strict=True):
        if values is not None:
            layer.register_parameter(kind, nn.Parameter(values, requires_grad=False))
    return layer


def _tensor(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor of its type, of which NumPy alone may not have one."""
    return torch.from_numpy(array.astype(np.float64)).to(getattr(torch, array.dtype.name))
