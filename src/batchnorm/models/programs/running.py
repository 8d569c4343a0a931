"""Running an exported model, of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.models.files import FileError, Model
from batchnorm.models.onnx_session import session_of
from batchnorm.models.programs.inputs import Inputs, batches, inputs_of_onnx, inputs_of_program

if TYPE_CHECKING:
    from onnx import ModelProto


def inputs_of(model: Model) -> Inputs:
    """Return what a model takes."""
    if isinstance(model, torch.export.ExportedProgram):
        return inputs_of_program(model)
    return inputs_of_onnx(model)


def calls_of(
    model: Model, values: Sequence[Tensor], size: int
) -> tuple[list[tuple[Tensor, ...]], int]:
    """Return data as the values of one call after the other, and how many examples are left.

    Args:
        model: The model.
        values: The data, of each input all examples.
        size: How many examples go into a call. Where the model takes no other number, those that
            are left at the end are not used.

    Raises:
        FileError: There are fewer examples than the model takes.
    """
    count = len(values[0])
    unused = count % size if inputs_of(model).batch_size is not None else 0
    if unused == count:
        raise FileError(f"got {count} examples, expected {size} or more, as many as it takes")
    return list(batches([value[: count - unused] for value in values], size)), unused


def outputs_of(model: Model, values: Sequence[Tensor]) -> Any:
    """Return what a model returns.

    Args:
        model: The model.
        values: Those of its inputs, in their order.

    Raises:
        FileError: It cannot be run.
    """
    inputs = inputs_of(model)
    if isinstance(model, torch.export.ExportedProgram):
        args, keywords = inputs.arguments(values)
        with torch.no_grad():
            return model.module()(*args, **keywords)
    names = [tensor.name for tensor in inputs.tensors]
    feeds = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    return [torch.as_tensor(found) for found in checked_session_of(model).run(None, feeds)]


def checked_session_of(model: ModelProto) -> Any:
    """Return a session of ONNX Runtime.

    Raises:
        FileError: It cannot run the model.
    """
    try:
        return session_of(model)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of classes of its own
        reason = str(error).strip().splitlines()[0]
        raise FileError(f"ONNX Runtime cannot run the model, '{reason}'") from error
