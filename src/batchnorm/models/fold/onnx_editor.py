"""Editing ONNX graphs: other initializers, and fewer nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.models.fold.graph import Map, Op
from batchnorm.models.fold.onnx_nodes import graphs_of, reads

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_TYPES = {
    torch.float64: "DOUBLE",
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
}


class OnnxEditor:
    """Edits a graph.

    Args:
        graph: The graph, changed in place; `finish` ends it.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.graph, self.nodes = graph, list(graph.node)
        self._by_output = {node.output[0]: node for node in self.nodes}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._taken = {
            *self._initializers,
            *(value.name for value in graph.input),
            *(name for node in self.nodes for name in (*reads(node), *node.output)),
        }
        self._made: dict[tuple[str, str], str] = {}
        self._same: dict[str, str] = {}

    def set_weight(self, op: Map, values: Tensor, dtype: torch.dtype) -> None:
        """Give a linear map another weight."""
        node = self._by_output[op.node[0].output[0]]
        node.input[1] = self._tensor((op.weight, "weight"), op.weight, values, dtype)

    def set_bias(self, op: Map, values: Tensor, dtype: torch.dtype, is_own: bool) -> None:
        """Give a linear map another bias, or a first one.

        Args:
            op: The linear map.
            values: Its bias.
            dtype: The type of that.
            is_own: Whether it has one that nothing else reads.
        """
        wanted = str(op.bias) if is_own else f"{op.name}.bias"
        name = self._tensor((op.weight, "bias"), wanted, values, dtype, is_own=is_own)
        node = self._by_output[op.node[-1].output[0]]
        if op.what != "MatMul":
            node.input.extend([""] * (3 - len(node.input)))
            node.input[2] = name
        elif op.bias is not None:
            node.input[list(node.input).index(op.bias)] = name
        else:
            self._add_after(node, name)

    def _add_after(self, node: NodeProto, bias: str) -> None:
        from onnx import helper

        output = node.output[0]
        node.output[0] = self._new(f"{output}_product")
        add = helper.make_node("Add", [node.output[0], bias], [output], self._new(f"{output}_bias"))
        self.nodes.insert(next(i for i, n in enumerate(self.nodes) if n is node) + 1, add)

    def _tensor(
        self,
        part: tuple[str, str],
        wanted: str,
        values: Tensor,
        dtype: torch.dtype,
        is_own: bool = True,
    ) -> str:
        """Return the name of an initializer with these values.

        Args:
            part: Of which weight it is what: the same each time that one is used.
            wanted: Its name, if nothing has that.
            values: What it has.
            dtype: In which type.
            is_own: Whether it takes the place of the initializer of that name.
        """
        from onnx import TensorProto, helper

        if part not in self._made:
            name = wanted if is_own and wanted in self._initializers else self._new(wanted)
            raw = values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
            kind = getattr(TensorProto, _TYPES[dtype])
            self._initializers[name] = helper.make_tensor(name, kind, values.shape, raw, raw=True)
            self._made[part] = name
        return self._made[part]

    def take_out(self, op: Op) -> None:
        """Let what reads a batch norm's output read its input."""
        node = self._by_output[op.node[0].output[0]]
        self._same[node.output[0]] = node.input[0]
        self.nodes = [other for other in self.nodes if other is not node]

    def finish(self) -> None:
        """Rename, remove what nothing reads any more, and write all of it into the graph."""
        outputs = {value.name for value in self.graph.output}
        names = {name: self._source(name) for name in self._same}
        # the output of a model keeps its name
        kept = {source: name for name, source in names.items() if name in outputs}
        names = {**{n: kept.get(source, source) for n, source in names.items()}, **kept}
        live, nodes = set(outputs), list[Any]()
        for node in reversed(self.nodes):
            _rename(node, names)
            if live & set(node.output):
                live.update(reads(node))
                nodes.append(node)
        nodes = [type(node).FromString(node.SerializeToString()) for node in reversed(nodes)]
        tensors = [
            type(t).FromString(t.SerializeToString())
            for t in self._initializers.values()
            if t.name in live or t.name in {value.name for value in self.graph.input}
        ]
        types = [v for v in self.graph.value_info if v.name in live and v.name not in kept.values()]
        types = [type(v).FromString(v.SerializeToString()) for v in types]
        for field, values in (("node", nodes), ("initializer", tensors), ("value_info", types)):
            del getattr(self.graph, field)[:]
            getattr(self.graph, field).extend(values)

    def _source(self, name: str) -> str:
        while name in self._same:
            name = self._same[name]
        return name

    def _new(self, wanted: str) -> str:
        name = wanted
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _rename(node: NodeProto, names: dict[str, str]) -> None:
    for field in (node.input, node.output):
        for at, name in enumerate(field):
            field[at] = names.get(name, name)
    for attribute in node.attribute:
        for body in graphs_of(attribute):
            for inner in body.node:
                _rename(inner, names)
            for value in body.output:
                value.name = names.get(value.name, value.name)
