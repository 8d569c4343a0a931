"""What data show of an exported model, in the terms in which the doctor thinks of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.check.known import Known
from batchnorm.diagnose.check.look import look
from batchnorm.diagnose.check.seen import SeenByLayer
from batchnorm.diagnose.observe import Seen
from batchnorm.diagnose.programs import check_there
from batchnorm.layers import BatchNorm
from batchnorm.models.batches import limited, progress_bar
from batchnorm.models.programs.layered import LayeredProgram, norms
from batchnorm.models.programs.moved import Statistics
from batchnorm.models.programs.onnx_norms import observable
from batchnorm.models.programs.onnx_twice import Twice

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

_Calls = Sequence[tuple[Tensor, ...]]
_Labels = Sequence[Tensor] | None

#: What takes the statistics of a file anew.
CALIBRATE = "batchnorm calibrate MODEL DATA -o OUT"


class InAFile(Known):
    """What is known of an exported model, whose layers have the names of the module's."""

    def spelled(self, name: str) -> str:
        """Return a layer as one writes it for the module."""
        return f"model.get_submodule({name!r})" if name else "model"

    def recalibrated(self, name: str) -> str:
        """Return the command that takes statistics anew."""
        return CALIBRATE

    def is_ours(self, name: str) -> bool:
        """Return that no layer is known to be one of this package."""
        return False


def of_program(
    program: ExportedProgram, calls: _Calls, labels: _Labels, max_batches: int | None
) -> tuple[Known, dict[str, str]]:
    """Return what is known of a program, and the batch norms that are left, with the reason.

    Args:
        program: The program; it stays as it is.
        calls: The values of its inputs, of one call after the other.
        labels: Those of each call, if there are any.
        max_batches: How many calls at most.

    Raises:
        FileError: It has no batch norm, or cannot be run.
    """
    made = LayeredProgram(program)
    check_there(made.layers, made.left)
    known = InAFile(made, dict(made.layers))
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


def of_onnx(
    model: ModelProto, calls: _Calls, labels: _Labels, max_batches: int | None
) -> tuple[Known, dict[str, str]]:
    """Return what is known of an ONNX model, and the batch norms that are left, with the reason.

    Args:
        model: The model; it stays as it is.
        calls: The values of its inputs, of one call after the other.
        labels: Those of each call, if there are any.
        max_batches: How many calls at most.

    Raises:
        FileError: It has no batch norm, or cannot be run.
    """
    found, left = observable(model)
    check_there(found, left)
    layers: dict[str, _BatchNorm] = {}
    for norm in found:
        assert norm.arrays is not None  # or else it is not observable
        mean, var = map(_tensor, norm.arrays)
        affine = (None, None) if norm.affine is None else tuple(map(_tensor, norm.affine))
        eps = float(f"{norm.eps:.6g}")  # which is a float32 in the file
        layers[norm.name] = _layer((mean, var), affine, eps, norm.momentum, None)
    known, twice = InAFile(nn.Module(), layers), Twice(model, found)
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
