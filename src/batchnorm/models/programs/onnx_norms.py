"""The batch norms of an ONNX model, and the statistics that they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchnorm.models.files import FileError
from batchnorm.models.fold.onnx_nodes import attributes_of, norm_name
from batchnorm.models.programs.moved import Statistics
from batchnorm.models.programs.protobuf import parts

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

#: Where a batch norm of ONNX has gamma and beta, and its running mean and variance.
_GAMMA, _BETA, _MEAN, _VAR = 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm in an ONNX graph.

    Attributes:
        name: What the layer is called.
        node: Its node.
        arrays: The running mean and variance; None where they are computed in the graph.
        affine: Likewise, gamma and beta.
    """

    name: str
    node: NodeProto
    arrays: tuple[NDArray[Any], NDArray[Any]] | None
    affine: tuple[NDArray[Any], NDArray[Any]] | None

    @property
    def statistics(self) -> Statistics:
        """The same as tensors, which have fewer types."""
        assert self.arrays is not None
        mean, var = (torch.from_numpy(array.astype(np.float64)) for array in self.arrays)
        return mean, var

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(attributes_of(self.node).get("epsilon", 1e-5))

    @property
    def momentum(self) -> float:
        """How much a batch counted in training, of which ONNX has the rest."""
        return 1 - float(attributes_of(self.node).get("momentum", 0.9))


def norms(model: ModelProto) -> list[Norm]:
    """Return the batch norms of a model's main graph, each under a name of its own."""
    import onnx

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = node.attribute[0].t

    def read(node: NodeProto, *places: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
        one, other = (values.get(node.input[at]) for at in places)
        if one is None or other is None:
            return None
        return onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other)

    found: dict[str, Norm] = {}
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            name = norm_name(node, found)
            found[name] = Norm(name, node, read(node, _MEAN, _VAR), read(node, _GAMMA, _BETA))
    return list(found.values())


def observable(model: ModelProto) -> tuple[list[Norm], dict[str, str]]:
    """Return the batch norms whose statistics can be compared and set.

    Args:
        model: The model.

    Returns:
        They, and the others, each with the reason.

    Raises:
        FileError: One was exported in training.
    """
    left = dict.fromkeys(_inner(model), "it is in a branch or a function")
    found = norms(model)
    for norm in found:
        if _trains(norm.node):
            raise FileError(
                f"{norm.name!r} was exported in training, and normalizes by each batch: export "
                "model.eval()"
            )
        if norm.arrays is None:
            left[norm.name] = "its statistics are computed in the graph"
    return [norm for norm in found if norm.name not in left], left


def statistics_of_onnx(model: ModelProto) -> dict[str, Statistics]:
    """Return the mean and the variance of each batch norm of a model that has them."""
    return {norm.name: norm.statistics for norm in norms(model) if norm.arrays is not None}


def assign(model: ModelProto, norm: Norm, arrays: Sequence[NDArray[Any]]) -> None:
    """Give a node statistics of its own.

    Args:
        model: The model.
        norm: The node.
        arrays: Its mean and variance, in the type that it has them in.
    """
    import onnx

    uses = Counter(name for node in parts(model, "NodeProto") for name in node.input)
    uses.update(value.name for value in model.graph.output)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = (name for node in parts(model, "NodeProto") for name in node.output)
    taken = {*tensors, *uses, *outputs}
    for at, word, values in ((_MEAN, "mean", arrays[0]), (_VAR, "var", arrays[1])):
        name = norm.node.input[at]
        if name in tensors and uses[name] == 1:
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
        else:  # what other nodes have, too, as equal tensors are kept once
            name = f"{norm.name}.running_{word}"
            while name in taken:
                name += "_"
            taken.add(name)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
            norm.node.input[at] = name


def _inner(model: ModelProto) -> list[str]:
    """Return the names of the batch norms that are not in the main graph."""
    inner = [attribute for node in model.graph.node for attribute in node.attribute]
    return [
        norm_name(node)
        for part in (*inner, *model.functions)
        for node in parts(part, "NodeProto")
        if node.op_type == "BatchNormalization"
    ]


def _trains(node: NodeProto) -> bool:
    trains = any(a.name == "training_mode" and a.i for a in node.attribute)
    return trains or sum(map(bool, node.output)) > 1
