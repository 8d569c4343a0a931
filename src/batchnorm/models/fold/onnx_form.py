"""Folding in ONNX models: other initializers, and fewer nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.models.fold.choose import chosen
from batchnorm.models.fold.graph import Map
from batchnorm.models.fold.onnx_editor import OnnxEditor
from batchnorm.models.fold.onnx_nodes import inner_nodes, norm_name
from batchnorm.models.fold.onnx_reader import OnnxReader
from batchnorm.models.fold.plan import Plan
from batchnorm.models.onnx_session import session_of
from batchnorm.models.walk import Where

if TYPE_CHECKING:
    from onnx import ModelProto


class OnnxForm:
    """An ONNX model, what it computes, and how it is folded.

    Args:
        model: The model; it is left as it is.
        example: The values of its inputs, tensors or arrays, in their order.
        keywords: Those of the others, by name.
        where: Which layers may be folded.
        is_verified: Whether what is folded is run.

    Attributes:
        graph: What it computes.
        tensors: Its constants, by name.
        names: The layers that may be folded.
        left: Why others cannot be.
        expected: What it returns.
    """

    def __init__(
        self,
        model: ModelProto,
        example: Sequence[Any] | None,
        keywords: Mapping[str, Any],
        where: Where,
        is_verified: bool,
    ) -> None:
        self._model, self._example, self._keywords = model, example, dict(keywords)
        reader = OnnxReader(model)
        if reader.trained:
            raise ValueError(
                f"{reader.trained[0]!r} was exported in training mode, where there is nothing to "
                "fold: call model.eval() before torch.onnx.export"
            )
        self.graph, self.tensors = reader.graph, reader.tensors
        self.graph.gives_biases = True
        inner = {
            norm_name(node): "it is in a branch or a function"
            for nodes in (*map(inner_nodes, model.graph.node), *(f.node for f in model.functions))
            for node in nodes
            if node.op_type == "BatchNormalization"
        }
        self.names = chosen([*self.graph.norms, *inner], where)
        self.left = {name: reason for name, reason in inner.items() if name in self.names}
        self.expected = self.run(model) if is_verified else None

    def run(self, model: ModelProto) -> list[Tensor]:
        """Return what a model returns for the example, by ONNX Runtime."""
        if self._example is None and not self._keywords:
            raise ValueError(
                "an ONNX model brings no example inputs: pass the values of its inputs, or "
                "verify=False"
            )
        session, example = session_of(model), self._example or ()
        names = [value.name for value in session.get_inputs()]
        given = dict(zip(names, example, strict=False)) | self._keywords
        if given.keys() != set(names) or len(given) != len(example) + len(self._keywords):
            raise ValueError(
                f"example has {len(example)} values, and keywords has "
                f"{', '.join(map(repr, self._keywords)) or 'none'}: expected one for each input of "
                f"the model, {', '.join(map(repr, names))}"
            )
        feeds = {
            name: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v)
            for name, v in given.items()
        }
        return [torch.from_numpy(np.array(values)) for values in session.run(None, feeds)]

    def apply(self, plan: Plan) -> ModelProto:
        """Return another model with the batch norms of a plan folded."""
        from onnx import ModelProto

        new = ModelProto()
        new.CopyFrom(self._model)
        editor = OnnxEditor(new.graph)
        for op in self.graph.ops:
            folding = plan.foldings.get(op.weight) if isinstance(op, Map) else None
            if folding is not None and isinstance(op, Map):
                editor.set_weight(op, folding.weight, folding.dtype)
                if folding.bias is not None:
                    editor.set_bias(op, folding.bias, folding.dtype, self.graph.has_own_bias(op))
        for name in plan.folded:
            for call in self.graph.norms[name]:
                editor.take_out(call)
        editor.finish()
        return new
