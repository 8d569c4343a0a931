"""Running an ONNX model twice: in evaluation, and by the moments of each batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.models.programs.inputs import inputs_of_onnx
from batchnorm.models.programs.onnx_norms import Norm
from batchnorm.models.programs.onnx_observing import telling
from batchnorm.models.programs.running import checked_session_of

if TYPE_CHECKING:
    from onnx import ModelProto


class Twice:
    """An ONNX model that tells what its batch norms get, and what it would return in training.

    Args:
        model: The model, which stays as it is.
        wanted: Which batch norms, with statistics that can be read.

    Raises:
        FileError: ONNX Runtime cannot run it.
    """

    def __init__(self, model: ModelProto, wanted: Sequence[Norm]) -> None:
        import onnx

        self._inputs = [tensor.name for tensor in inputs_of_onnx(model).tensors]
        self._outputs = [value.name for value in model.graph.output]
        self._got = {norm.name: str(norm.node.input[0]) for norm in wanted}
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        for name in dict.fromkeys(self._got.values()):
            if name not in (*self._inputs, *self._outputs):
                watched.graph.output.append(onnx.ValueInfoProto(name=name))
        self._evaluation = checked_session_of(watched)
        self._by_batch = checked_session_of(telling(model, wanted, True, None))

    def evaluation(self, values: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return what it returns in evaluation, and what each batch norm gets, by its name.

        Args:
            values: Those of the inputs, in their order.
        """
        wished = list(dict.fromkeys([*self._outputs, *self._got.values()]))
        wished = [name for name in wished if name not in self._inputs]
        found = dict(zip(wished, self._evaluation.run(wished, self._fed(values)), strict=True))
        found |= self._fed(values)
        got = {name: torch.from_numpy(found[x]) for name, x in self._got.items()}
        return _tensors(found[name] for name in self._outputs), got

    def by_batch(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return what it returns where each batch norm normalizes by the moments of the batch.

        Args:
            values: As of `evaluation`.
        """
        return _tensors(self._by_batch.run(self._outputs, self._fed(values)))

    def _fed(self, values: Sequence[Tensor]) -> dict[str, Any]:
        return {n: value.numpy() for n, value in zip(self._inputs, values, strict=True)}


def _tensors(found: Iterable[Any]) -> list[Tensor]:
    """Return those outputs that are arrays of numbers."""
    return [
        torch.from_numpy(value)
        for value in found
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
    ]
