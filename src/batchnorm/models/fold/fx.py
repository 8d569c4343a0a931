"""Reading graphs of torch.fx: those that TorchDynamo captures, and those of torch.export."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from batchnorm.models.fold import nodes
from batchnorm.models.fold.graph import Graph, Map, Norm, Op, Value, View

BATCH_NORMS = {
    "batch_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
}  # fmt: skip
#: The names of the arguments that are the input, the weight and the bias.
_MAPS = {
    **dict.fromkeys((*nodes.CONVOLUTIONS, "convolution", "linear"), ("input", "weight", "bias")),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
}
_PRODUCTS = {"linear", "addmm", "mm"}
BY_THE_BATCH = "it normalizes by the batch's own moments"


class Reader:
    """Reads graphs, one after the other.

    Args:
        tensors: The tensors of the model, by their names.

    Attributes:
        graph: What was read.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.graph = tensors, Graph()
        self._names: dict[fx.Node, str] = {}
        self._swapped: set[fx.Node] = set()
        self._values: dict[fx.Node, Value] = {}

    def read(self, graph: fx.Graph, names: Mapping[fx.Node, str]) -> None:
        """Add the operations of a graph.

        Args:
            graph: The graph.
            names: Which placeholder is which tensor of the model.
        """
        self._names, self._swapped, self._values = dict(names), set(), {}
        for node in graph.nodes:
            if node in names:
                continue
            tensor = nodes.tensor_of(node)
            self._values[node] = Value(
                nodes.shape_of(node), tensor is None or tensor.is_floating_point()
            )
            if node.op not in ("placeholder", "get_attr") and not self._is_renamed(node):
                reads = [self._names[n] for n in nodes.read_by(node) if n in self._names]
                self.graph.add(self._op(node), reads)

    def _is_renamed(self, node: fx.Node) -> bool:
        """Return whether a node is what was read already, or a tensor in another type or turned.

        It is noted which.
        """
        source = next(iter(node.all_input_nodes), None)
        if source is None:
            return False
        name = self._names.get(source)
        if name is not None:
            turns = self.tensors[name].ndim == 2 and nodes.order_of(node, 2) == (1, 0)
            if turns or nodes.casts(node):
                self._names[node] = name
                del self._values[node]
                if turns != (source in self._swapped):
                    self._swapped.add(node)
                return True
        norm = self._values[source].producer if source in self._values else None
        if not isinstance(norm, Norm) or nodes.called(node) != "getitem":
            return False
        if node.args[1] == 0:
            self._values[node] = self._values[source]
        elif node.users:
            self.graph.stuck[norm.layer] = "the moments that it returns are read"
        return True

    def _op(self, node: fx.Node) -> Op:
        name = nodes.called(node)
        inputs = [self._values[n] for n in nodes.read_by(node) if n in self._values]
        common: dict[str, Any] = {
            "what": "the output" if node.op == "output" else name,
            "at": len(self.graph.ops),
            "inputs": inputs,
            "output": self._values[node],
            "node": node,
        }
        if node.op != "output" and inputs:
            arguments = nodes.arguments_of(node)
            if name in BATCH_NORMS:
                return self._norm(node, arguments, common)
            if name in _MAPS:
                found = self._map(name, arguments, common)
                if found is not None:
                    return found
                common["what"] += " with a computed weight"
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node) and source in self._values:
                dims = nodes.dims_of(node, source)
                if dims is not None:
                    return View(**common, dims=dims)
        return Op(**common, writes=node.op != "output" and nodes.writes(node))

    def _norm(self, node: fx.Node, arguments: Mapping[str, Any], common: dict[str, Any]) -> Op:
        given = [arguments.get(n) for n in ("running_mean", "running_var", "weight", "bias")]
        names = tuple(self._names.get(value) if value is not None else None for value in given)
        known = next((name for name in names if name is not None), None)
        layer = node.name if known is None else known.rpartition(".")[0]
        op = Norm(**common, layer=layer, names=names, eps=arguments.get("eps", 1e-5))  # type: ignore[arg-type]
        if "epsilon" in arguments:
            op.eps = arguments["epsilon"]
        if given[0] is None or given[1] is None:
            self.graph.stuck[layer] = "it has no running statistics"
        elif arguments.get("training", False):
            self.graph.stuck[layer] = BY_THE_BATCH
        elif len(op.inputs) != 1 or any(
            v is not None and n is None for v, n in zip(given, names, strict=True)
        ):
            self.graph.stuck[layer] = "what it normalizes by is computed in the forward pass"
        return op

    def _map(self, name: str, arguments: Mapping[str, Any], common: dict[str, Any]) -> Op | None:
        """Return a linear map, if it is one whose weight and bias are tensors of the model."""
        if any(arguments.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            return None
        source, weight, bias = (arguments.get(key) for key in _MAPS[name])
        if source not in self._values or weight not in self._names:
            return None
        if not self._tensor(weight).is_floating_point():
            return None
        if bias is not None and (bias not in self._names or self._tensor(bias).ndim != 1):
            return None
        shape, is_swapped = self._tensor(weight).shape, weight in self._swapped
        op = Map(**common, weight=self._names[weight])
        op.bias = None if bias is None else self._names[bias]
        if name in _PRODUCTS:  # of torch, outputs by inputs is the transpose of what is multiplied
            op.transposed, spatial = is_swapped == (name == "linear"), 0
        else:
            op.transposed = bool(arguments.get("transposed", "transpose" in name))
            op.groups, spatial = arguments.get("groups", 1), len(shape) - 2
            op.is_uneven = _is_uneven(arguments, shape[2:], op.transposed)
        op.in_dim = op.out_dim = len(self._values[source].shape or ()) - spatial - 1
        is_known = len(shape) == 2 if name in _PRODUCTS else not is_swapped
        return op if is_known else None

    def _tensor(self, node: fx.Node) -> Tensor:
        return self.tensors[self._names[node]]


def _is_uneven(arguments: Mapping[str, Any], kernel: tuple[int, ...], transposed: bool) -> bool:
    """Return whether what is the same everywhere comes out of a convolution as what is not."""
    if transposed:  # how many values of the kernel meet at a place depends on where it is
        return (
            math.prod(kernel) != 1
            or _any(arguments.get("stride", 1), 1)
            or _any(arguments.get("output_padding", 0), 0)
        )
    padding = arguments.get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid" and math.prod(kernel) != 1
    return _any(padding, 0)


def _any(amounts: Any, other_than: int) -> bool:
    return any(
        a != other_than for a in (amounts if isinstance(amounts, tuple | list) else [amounts])
    )
