"""Reading ONNX graphs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from batchnorm.models.fold.graph import (
    Graph,
    Map,
    Norm,
    Op,
    Shape,
    Value,
    View,
    kept,
    permuted,
    reshaped,
)
from batchnorm.models.fold.onnx_constants import Constants
from batchnorm.models.fold.onnx_nodes import attributes_of, norm_name, reads

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_COPIES = {"Identity", "Dropout", "Cast", "CastLike", "GlobalAveragePool"}
_SIZES = {"Shape", "Size"}


class OnnxReader:
    """Reads the main graph of an ONNX model.

    Args:
        model: The model.

    Attributes:
        graph: What it computes.
        tensors: Its constants that layers have, by name.
        trained: The batch norms that normalize by the batch.
    """

    def __init__(self, model: ModelProto) -> None:
        import onnx

        self.graph, self.trained = Graph(), list[str]()
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._types = {v.name: v for v in (*inferred.value_info, *inferred.input, *inferred.output)}
        self._constants = Constants(model, self._types)
        self.tensors = self._constants.found
        self._values: dict[str, Value] = {}
        self._readers: Counter[str] = Counter(v.name for v in model.graph.output)
        for node in model.graph.node:
            self._readers.update(set(reads(node)))
        for node in model.graph.node:
            self._read(node)
        for value in model.graph.output:
            op = Op("the output", len(self.graph.ops), [self._value(value.name)], Value())
            self.graph.add(op, [value.name])

    def _read(self, node: NodeProto) -> None:
        output = self._value(node.output[0]) if node.output else Value()
        names = [] if node.op_type in _SIZES else list(dict.fromkeys(reads(node)))
        op = Op(node.op_type, len(self.graph.ops), [self._value(n) for n in names], output)
        op.node = [node]
        if node.domain in ("", "ai.onnx"):
            if node.op_type == "BatchNormalization":
                op = self._norm(node, op)
            elif node.op_type == "Add" and self._is_bias(node):
                return
            else:
                op = self._map(node, op) or self._view(node, op) or op
        if isinstance(op, Norm | Map | View):
            op.inputs = op.inputs[:1]
        self.graph.add(op, names)

    def _norm(self, node: NodeProto, op: Op) -> Norm:
        scale, bias, mean, var = node.input[1:5]
        attributes = attributes_of(node)
        layer = norm_name(node, self.graph.norms)
        norm = Norm(**vars(op), layer=layer, eps=attributes.get("epsilon", 1e-5))
        norm.names = (mean, var, scale, bias)
        if attributes.get("training_mode") or sum(map(bool, node.output)) > 1:
            self.trained.append(layer)
        if attributes.get("spatial", 1) != 1:
            self.graph.stuck[layer] = "it normalizes each position by itself"
        if any(self._constants.get(name) is None for name in node.input[1:5]):
            self.graph.stuck[layer] = "what it normalizes by is computed, or an input of the model"
        return norm

    def _map(self, node: NodeProto, op: Op) -> Map | None:
        kind, given = node.op_type, attributes_of(node)
        if kind not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return None
        weight = self._constants.get(node.input[1])
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if weight is None or (bias is not None and self._constants.get(bias) is None):
            op.what = f"{kind} with a computed weight or bias"
            return None
        found = Map(**vars(op), weight=node.input[1], bias=bias)
        if kind in ("Conv", "ConvTranspose"):
            found.transposed, found.groups = kind == "ConvTranspose", given.get("group", 1)
            found.is_uneven = _is_uneven(given, tuple(weight.shape[2:]), found.transposed)
            return found
        found.in_dim = found.out_dim = len(op.inputs[0].shape or ()) - 1
        found.transposed = not given.get("transB", 0)
        is_plain = all(given.get(factor, 1.0) == 1 for factor in ("alpha", "beta"))
        outputs = weight.shape[1 if found.transposed else 0] if weight.ndim == 2 else 0
        if not outputs or not is_plain or given.get("transA", 0):
            return None
        return found if bias is None or self._is_row(bias, outputs) else None

    def _is_bias(self, node: NodeProto) -> bool:
        """Return whether an addition is that of a bias, of the product before it; note it there."""
        for name, bias in (tuple(node.input), tuple(reversed(node.input))):
            product = self._value(name).producer
            if (
                isinstance(product, Map)
                and product.what == "MatMul"
                and product.bias is None
                and self._readers[name] == 1
                and self._constants.get(bias) is not None
                and self._is_row(bias, self.tensors[product.weight].shape[1])
            ):
                product.bias, product.output = bias, self._value(node.output[0])
                product.output.producer = product
                product.node.append(node)
                self.graph.uses[bias].append(product)
                return True
        return False

    def _is_row(self, name: str, size: int) -> bool:
        shape = self.tensors[name].shape
        return shape[-1:] == (size,) and math.prod(shape) == size

    def _view(self, node: NodeProto, op: Op) -> View | None:
        kind, given = node.op_type, attributes_of(node)
        if not op.inputs:
            return None
        before, after, dims = op.inputs[0].shape, op.output.shape, None
        if kind in _RESHAPES:
            dims = reshaped(before, after)
        elif kind in _COPIES and (kind != "Dropout" or self._is_off(node)):
            dims = kept(before, after)
        elif kind == "Transpose" and before is not None:
            dims = permuted(given.get("perm", range(len(before))[::-1]))
        elif kind == "ReduceMean" and before is not None:
            dims = self._averaged(node, len(before))
        elif kind == "Pad" and given.get("mode", b"constant") != b"constant":
            pads = given.get("pads")
            if pads is None:
                amounts = self._constants.get(node.input[1])
                pads = [-1] if amounts is None else amounts.tolist()
            dims = kept(before, after) if all(pad >= 0 for pad in pads) else {}
        return None if dims is None else View(**vars(op), dims=dims)

    def _is_off(self, node: NodeProto) -> bool:
        """Return whether a dropout lets everything through, and nothing asks what it dropped."""
        if len(node.input) > 2 and node.input[2]:
            training = self._constants.get(node.input[2])
            if training is None or bool(training):
                return False
        return len(node.output) < 2 or not self._readers[node.output[1]]

    def _averaged(self, node: NodeProto, rank: int) -> dict[int, int]:
        """Return where the dimensions are over which no mean is taken."""
        given = attributes_of(node)
        axes = given.get("axes")
        if len(node.input) > 1 and node.input[1]:
            constant = self._constants.get(node.input[1])
            if constant is None:
                return {}
            axes = constant.tolist()
        gone = {axis % rank for axis in axes or ()}
        left = [dim for dim in range(rank) if dim not in gone]
        if not gone:
            return {}
        return {dim: dim if given.get("keepdims", 1) else at for at, dim in enumerate(left)}

    def _value(self, name: str) -> Value:
        """Return what stands for a value, or for a constant, which nothing follows."""
        if name not in self._values:
            self._values[name] = Value(self._shape(name), self._is_floating(name))
        return self._values[name]

    def _shape(self, name: str) -> Shape | None:
        known = self._types.get(name)
        if known is None or not known.type.tensor_type.HasField("shape"):
            return None
        return tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{name}.{at}"
            for at, dim in enumerate(known.type.tensor_type.shape.dim)
        )

    def _is_floating(self, name: str) -> bool:
        import onnx

        kind = self._types[name].type.tensor_type.elem_type if name in self._types else 0
        return kind in (
            onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
        )  # fmt: skip


def _is_uneven(given: dict[str, Any], kernel: Sequence[int], transposed: bool) -> bool:
    """Return whether what is the same everywhere comes out of a convolution as what is not."""
    if transposed:
        strides, more = given.get("strides", ()), given.get("output_padding", ())
        return (
            math.prod(kernel) != 1
            or any(s != 1 for s in strides)
            or any(more)
            or ("output_shape" in given)
        )
    if given.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return math.prod(kernel) != 1
    return any(given.get("pads", ()))
