"""Tensors of ONNX models that are the same in every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

#: What a constant may be computed by, as exporters do.
_COMPUTED = {
    "Constant", "Identity", "Cast", "CastLike", "Expand", "Shape", "Reshape", "Transpose",
    "Unsqueeze", "Squeeze", "Concat", "ConstantOfShape",
}  # fmt: skip


class Constants:
    """The constants of a model, each looked at when it is asked for.

    Args:
        model: The model.
        types: What is known of its values, by name.

    Attributes:
        found: Those that were asked for.
    """

    def __init__(self, model: ModelProto, types: Mapping[str, ValueInfoProto]) -> None:
        self.found: dict[str, Tensor] = {}
        self._types = types
        self._given = {value.name for value in model.graph.input}
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}

    def get(self, name: str) -> Tensor | None:
        """Return a tensor that is the same in every call, or None if it is not one."""
        if name not in self.found:
            array = self._evaluate(name)
            if array is None:
                return None
            self.found[name] = _tensor(array)
        return self.found[name]

    def _evaluate(self, name: str) -> Any:
        import onnx
        from onnx.reference import ReferenceEvaluator

        if name in self._initializers:
            if name in self._given:  # a default, which a caller may replace
                return None
            return onnx.numpy_helper.to_array(self._initializers[name])
        node = self._producers.get(name)
        if node is None or node.op_type not in _COMPUTED or node.domain not in ("", "ai.onnx"):
            return None
        feeds = {}
        for at, source in enumerate(node.input):
            is_type = node.op_type == "CastLike" and at == 1
            array = self._empty(source) if is_type else self._evaluate(source)
            if array is None:
                return None
            feeds[source] = array
        found: Any = ReferenceEvaluator(node).run(None, feeds)
        return found[0]

    def _empty(self, name: str) -> Any:
        """Return an array of the type of a value, if that is known."""
        import onnx

        if name not in self._types:
            return None
        kind = self._types[name].type.tensor_type.elem_type
        return np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(kind))


def _tensor(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype("float32")).to(torch.bfloat16)
    return torch.from_numpy(array.copy())
