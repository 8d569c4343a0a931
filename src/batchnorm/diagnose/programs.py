"""Shift and adaptation of exported models: programs of `torch.export`, and ONNX models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.diagnose.adapt import AdaptReport, adapt, blend, weight_of
from batchnorm.diagnose.evidence import Evidence
from batchnorm.diagnose.look import ALPHA, TOLERANCE, Look, evidence_of
from batchnorm.diagnose.shift import measure_shift
from batchnorm.diagnose.shift_report import ShiftReport
from batchnorm.layers import BatchNorm
from batchnorm.models.files import FileError, Model
from batchnorm.models.programs.calibrate_onnx import calibrate_onnx
from batchnorm.models.programs.layered import LayeredProgram, layer_of
from batchnorm.models.programs.moved import Statistics
from batchnorm.models.programs.onnx_norms import Norm, assign, observable
from batchnorm.models.programs.onnx_observing import observe
from batchnorm.models.programs.running import calls_of

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

_Calls = Sequence[tuple[Tensor, ...]]


def shift_of_model(
    model: Model,
    values: Sequence[Tensor],
    size: int,
    *,
    max_batches: int | None = None,
    train_batch_size: int = 32,
    alpha: float = ALPHA,
    tolerance: float = TOLERANCE,
) -> ShiftReport:
    """Return how far data are from those that an exported model was trained on.

    As `batchnorm.measure_shift` does. Of how many batches the training run had, an ONNX model
    knows nothing: many are taken.

    Args:
        model: A program of `torch.export`, or an ONNX model; it stays as it is.
        values: The data, of each input all examples.
        size: How many examples go into a call; see `calls_of`.
        max_batches: How many calls at most.
        train_batch_size: How many examples a batch of the training run had.
        alpha: The level of the tests.
        tolerance: A score that is no shift, however sure it is.

    Raises:
        FileError: The model has no batch norm to compare with, or cannot be run; or there are too
            few examples.
    """
    calls, _ = calls_of(model, values, size)
    with told():
        if isinstance(model, torch.export.ExportedProgram):
            made = _layered(model)
            report = measure_shift(
                made, _keywords(calls), max_batches=max_batches, train_batch_size=train_batch_size,
                alpha=alpha, tolerance=tolerance,
            )  # fmt: skip
            report.left.update(made.left)
            return report
        found, left = _observable(model)
        return _shift_of_onnx(
            model, found, left, calls, max_batches, train_batch_size, alpha, tolerance
        )


def adapt_model(
    model: Model,
    values: Sequence[Tensor],
    size: int,
    *,
    prior: float | None = None,
    max_batches: int | None = None,
    train_batch_size: int = 32,
) -> AdaptReport:
    """Blend the statistics of an exported model with those of other data, without labels.

    As `batchnorm.adapt` does; the model has no labels, and gamma and beta stay.

    Args:
        model: A program of `torch.export`, or an ONNX model; changed in place, unless something
            goes wrong.
        values: The data, of each input all examples.
        size: How many examples go into a call; see `calls_of`.
        prior: How many examples the source counts for; by size and shift of the data if left out.
        max_batches: How many calls at most.
        train_batch_size: How many examples a batch of the training run had.

    Raises:
        FileError: As `shift_of_model`; or `prior` is negative.
    """
    if prior is not None and not prior >= 0:
        raise FileError(f"prior is {prior}: expected 0 or more")
    calls, _ = calls_of(model, values, size)
    with told():
        if isinstance(model, torch.export.ExportedProgram):
            return _adapt_program(model, calls, prior, max_batches, train_batch_size)
        return _adapt_onnx(model, calls, prior, max_batches, train_batch_size)


@contextmanager
def told() -> Iterator[None]:
    """Let what is wrong with model or data be an error of the file."""
    try:
        yield
    except FileError:
        raise
    except ValueError as error:
        raise FileError(str(error)) from error


def _layered(program: ExportedProgram) -> LayeredProgram:
    made = LayeredProgram(program)
    _check_any(made.layers, made.left)
    return made


def _observable(model: ModelProto) -> tuple[list[Norm], dict[str, str]]:
    found, left = observable(model)
    _check_any(found, left)
    return found, left


def check_there(found: Sequence[Norm] | Mapping[str, Any], left: Mapping[str, str]) -> None:
    """Raise unless there is a batch norm, be it one with statistics or one that was left."""
    if not found and not left:
        raise FileError(
            "it has no batch norm, and a folded one remembers nothing of its training data: take "
            "the model before it is folded, exported by torch.onnx.export with optimize=False"
        )


def _check_any(found: Sequence[Norm] | Mapping[str, Any], left: Mapping[str, str]) -> None:
    """Raise unless there is a batch norm with statistics that can be read."""
    check_there(found, left)
    if not found:
        why = "; ".join(f"{name or 'itself'}: {reason}" for name, reason in left.items())
        raise FileError(f"none of its batch norms has running statistics to compare with ({why})")


def _keywords(calls: _Calls) -> list[dict[str, Any]]:
    """Return calls of a `LayeredProgram`: pairs would be taken for inputs and labels."""
    return [{"values": call} for call in calls]


def _adapt_program(
    program: ExportedProgram,
    calls: _Calls,
    prior: float | None,
    max_batches: int | None,
    train_batch_size: int,
) -> AdaptReport:
    made = _layered(program)
    report = adapt(
        made, _keywords(calls), prior=prior, max_batches=max_batches,
        train_batch_size=train_batch_size,
    )  # fmt: skip
    kept = [(tensor, tensor.clone()) for name in made.layers for tensor in made.kept(name)]

    def undo() -> None:
        for tensor, before in kept:
            tensor.copy_(before)

    report._undo = undo
    report.left.update(made.left)
    for name in list(report.done):
        reason = made.assign(name)
        if reason is not None:
            report.done.remove(name)
            report.weights.pop(name)
            report.left[name] = reason
    return report


def _adapt_onnx(
    model: ModelProto,
    calls: _Calls,
    prior: float | None,
    max_batches: int | None,
    train_batch_size: int,
) -> AdaptReport:
    found, left = _observable(model)

    def shift(norms: Sequence[Norm]) -> ShiftReport:
        return _shift_of_onnx(model, norms, left, calls, max_batches, train_batch_size)

    def undo() -> None:
        for norm in found:
            assert norm.arrays is not None  # or else it is not observable
            assign(model, norm, norm.arrays)

    before = shift(found)
    report = AdaptReport(examples=before.examples, before=before)
    report._undo = undo
    sane, _ = evidence_of(_layers(found), train_batch_size)
    look = Look({n.name: Evidence(*n.statistics, n.eps) for n in found if n.name in sane})

    def hear(told: Mapping[str, Tensor]) -> None:
        look.add_each({name: each for name, each in told.items() if name in look.evidence})

    def blended(name: str, source: Statistics, target: Statistics) -> Statistics:
        weight = weight_of(look.evidence[name], prior) if name in look.evidence else 1.0
        report.weights[name] = weight
        mean, var = (blend(s, t, weight) for s, t in zip(source, target, strict=True))
        return mean, var

    try:
        done = calibrate_onnx(model, calls, max_batches=max_batches, hear_each=hear, blend=blended)
        report.done, report.left = done.done, done.left
        now, _ = observable(model)  # in the same order, though what is named after tensors may not
        report.after = shift(
            [replace(norm, name=old.name) for norm, old in zip(now, found, strict=True)]
        )
    except BaseException:
        undo()
        raise
    report.weights = {name: report.weights[name] for name in report.done}
    return report


def _layers(found: Sequence[Norm]) -> dict[str, BatchNorm]:
    return {norm.name: layer_of(norm.statistics, norm.eps, norm.momentum) for norm in found}


def _shift_of_onnx(
    model: ModelProto,
    found: Sequence[Norm],
    left: Mapping[str, str],
    calls: _Calls,
    max_batches: int | None,
    train_batch_size: int,
    alpha: float = ALPHA,
    tolerance: float = TOLERANCE,
) -> ShiftReport:
    evidence, odd = evidence_of(_layers(found), train_batch_size)
    _check_any(evidence, odd)
    look, wanted = Look(evidence), [norm for norm in found if norm.name in evidence]
    observe(model, wanted, calls, "shift", max_batches=max_batches, hear_each=look.add_each)
    report = look.report(alpha, tolerance)
    report.left.update({**left, **odd})
    return report
