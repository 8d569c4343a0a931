"""Calibrating an ONNX model: its batch norms become arithmetic whose moments can be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.models.batches import limited, progress_bar
from batchnorm.models.files import FileError
from batchnorm.models.fold.onnx_nodes import norm_name
from batchnorm.models.programs.inputs import inputs_of_onnx
from batchnorm.models.programs.moved import Moved, ProgramReport, Statistics
from batchnorm.models.programs.protobuf import parts
from batchnorm.models.programs.running import checked_session_of
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

#: Where a batch norm of ONNX has its running mean and variance.
_MEAN, _VAR = 3, 4
#: Where the function below is, and what it needs.
_DOMAIN, _LEAST_OPSET, _LEAST_IR = "batchnorm", 18, 8
#: A batch norm by the moments of its batch, in float64. One value a channel has no variance: there
#: the running statistics normalize.
_FUNCTION = """
<domain: "batchnorm", opset_import: [OPSET]>
Normalize <eps> (x, scale, shift, mean, var) => (y, batch_mean, batch_var, count) {
    flat_shape = Constant <value_ints = [0, 0, -1]> ()
    axes = Constant <value_ints = [0, 2]> ()
    over = Constant <value_ints = [1, -1, 1]> ()
    one = Constant <value = int64 {1}> ()
    eps_32 = Constant <value_float: float = @eps> ()
    eps_64 = Cast <to = 11> (eps_32)
    flat = Reshape (x, flat_shape)
    wide = Cast <to = 11> (flat)
    batch_mean = ReduceMean <keepdims = 1> (wide, axes)
    distance = Sub (wide, batch_mean)
    square = Mul (distance, distance)
    batch_var = ReduceMean <keepdims = 1> (square, axes)
    values = Size (x)
    channels = Size (mean)
    count = Div (values, channels)
    single = Equal (count, one)
    mean_64 = Cast <to = 11> (mean)
    mean_over = Reshape (mean_64, over)
    used_mean = Where (single, mean_over, batch_mean)
    var_64 = Cast <to = 11> (var)
    var_over = Reshape (var_64, over)
    used_var = Where (single, var_over, batch_var)
    raised = Add (used_var, eps_64)
    deviation = Sqrt (raised)
    shifted = Sub (wide, used_mean)
    xhat = Div (shifted, deviation)
    scale_64 = Cast <to = 11> (scale)
    scale_over = Reshape (scale_64, over)
    scaled = Mul (xhat, scale_over)
    shift_64 = Cast <to = 11> (shift)
    shift_over = Reshape (shift_64, over)
    y_64 = Add (scaled, shift_over)
    y_flat = CastLike (y_64, x)
    shape = Shape (x)
    y = Reshape (y_flat, shape)
}
"""


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm in an ONNX graph.

    Attributes:
        name: What the layer is called.
        node: Its node.
        arrays: The running mean and variance; None where they are computed in the graph.
    """

    name: str
    node: NodeProto
    arrays: tuple[NDArray[Any], NDArray[Any]] | None

    @property
    def statistics(self) -> Statistics:
        """The same as tensors, which have fewer types."""
        assert self.arrays is not None
        mean, var = (torch.from_numpy(array.astype(np.float64)) for array in self.arrays)
        return mean, var


def norms(model: ModelProto) -> list[Norm]:
    """Return the batch norms of a model's main graph, each under a name of its own."""
    import onnx

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = node.attribute[0].t
    found: dict[str, Norm] = {}
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            name = norm_name(node, found)
            mean, var = (values.get(node.input[at]) for at in (_MEAN, _VAR))
            to_array = onnx.numpy_helper.to_array
            arrays = None if mean is None or var is None else (to_array(mean), to_array(var))
            found[name] = Norm(name, node, arrays)
    return list(found.values())


def calibrate_onnx(
    model: ModelProto,
    batches: Iterable[Sequence[Tensor]],
    *,
    max_batches: int | None = None,
) -> ProgramReport:
    """Set the statistics of an ONNX model's batch norms to the exact moments of data.

    As `batchnorm.calibrate` does, with the moments of each batch in float64, by ONNX Runtime. A
    layer that is used twice is two nodes, and each gets the moments of its own values.

    Args:
        model: The model, changed in place.
        batches: The values of the inputs, of one call after the other.
        max_batches: How many calls at most.

    Returns:
        What moved, and what was left, with the reason.

    Raises:
        FileError: It has no batch norms, was exported in training, or ONNX Runtime cannot run it.
    """
    found = norms(model)
    report = ProgramReport(left=dict.fromkeys(_inner(model), "it is in a branch or a function"))
    if not found and not report.left:
        raise FileError(
            "it has no batch norm; folded ones are gone, and torch.onnx.export folds what follows "
            "a convolution, unless optimize=False"
        )
    for norm in found:
        if _trains(norm.node):
            raise FileError(
                f"{norm.name!r} was exported in training, and normalizes by each batch: export "
                "model.eval()"
            )
        if norm.arrays is None:
            report.left[norm.name] = "its statistics are computed in the graph"
    wanted = [norm for norm in found if norm.name not in report.left]
    observed, outputs = _observing(model, wanted)
    session = checked_session_of(observed)
    names = [tensor.name for tensor in inputs_of_onnx(model).tensors]
    totals: list[Moments | None] = [None] * len(wanted)
    with progress_bar("calibrating", batches, max_batches, 1, True) as advance:
        for batch in limited(batches, max_batches):
            feeds = {name: value.numpy() for name, value in zip(names, batch, strict=True)}
            results = session.run(outputs, feeds)
            for at in range(len(wanted)):
                mean, var, count = results[3 * at : 3 * at + 3]
                moments = _moments(mean, var, int(count))
                if moments is not None:
                    total = totals[at]
                    totals[at] = moments if total is None else total + moments
            report.batches += 1
            advance()
    if report.batches == 0:
        raise FileError("there are no batches to calibrate with")
    for norm, total in zip(wanted, totals, strict=True):
        _assign(model, norm, total, report)
    return report


def statistics_of_onnx(model: ModelProto) -> dict[str, Statistics]:
    """Return the mean and the variance of each batch norm of a model that has them."""
    return {norm.name: norm.statistics for norm in norms(model) if norm.arrays is not None}


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


def _observing(model: ModelProto, wanted: Sequence[Norm]) -> tuple[ModelProto, list[str]]:
    """Return a model that normalizes by each batch's moments, and the names of these.

    There are three outputs for each layer: mean and variance in float64, and how many values a
    channel they are of.
    """
    import onnx

    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    if _opset(model) < _LEAST_OPSET:  # the copy alone: the model keeps its own
        try:
            observed = onnx.version_converter.convert_version(observed, _LEAST_OPSET)
        except Exception as error:  # of classes of its own
            raise FileError(
                f"the model is of opset {_opset(model)}, and onnx cannot convert it to "
                f"{_LEAST_OPSET}: export it with a later one"
            ) from error
    opset = f'"" : {_opset(observed)}'
    observed.functions.append(onnx.parser.parse_function(_FUNCTION.replace("OPSET", opset)))
    observed.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    observed.ir_version = max(observed.ir_version, _LEAST_IR)
    names = {norm.node.output[0] for norm in wanted}
    outputs: list[str] = []
    for node in observed.graph.node:
        if node.op_type == "BatchNormalization" and node.output[0] in names:
            eps = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            moments = [f"{_DOMAIN}.{len(outputs) + at}" for at in range(3)]
            node.op_type, node.domain = "Normalize", _DOMAIN
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("eps", eps))
            del node.output[1:]
            node.output.extend(moments)
            outputs += moments
    kinds = (onnx.TensorProto.DOUBLE, onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64)
    observed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kinds[at % 3], None)
        for at, name in enumerate(outputs)
    )
    return observed, outputs


def _opset(model: ModelProto) -> int:
    return max(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _moments(mean: NDArray[Any], var: NDArray[Any], count: int) -> Moments | None:
    """Return the moments of a batch, or None where there are none, or they are not finite."""
    if count == 0 or not (np.isfinite(mean).all() and np.isfinite(var).all()):
        return None
    flat = torch.from_numpy(mean).flatten(), torch.from_numpy(var).flatten()
    return Moments(count, flat[0], flat[1] * count)


def _assign(model: ModelProto, norm: Norm, total: Moments | None, report: ProgramReport) -> None:
    """Give a node statistics of its own, if there are any."""
    import onnx

    if total is None:
        report.left[norm.name] = "no batch was finite"
        return
    if not total.count > 1:
        report.left[norm.name] = "it saw one value a channel, which has no variance"
        return
    assert norm.arrays is not None  # or else it is not observed
    exact, before = (total.mean, total.var(correction=1)), norm.statistics
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is told
        found = [v.numpy().astype(old.dtype) for v, old in zip(exact, norm.arrays, strict=True)]
    for kind, values in zip(("mean", "variance"), found, strict=True):
        if not np.isfinite(values).all():
            report.left[norm.name] = f"its {kind} does not fit {values.dtype.name}"
            return
    uses = Counter(name for node in parts(model, "NodeProto") for name in node.input)
    uses.update(value.name for value in model.graph.output)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = (name for node in parts(model, "NodeProto") for name in node.output)
    taken = {*tensors, *uses, *outputs}
    for at, word, values in ((_MEAN, "mean", found[0]), (_VAR, "var", found[1])):
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
    report.moved[norm.name] = Moved.between(int(total.count), before, exact)
    report.done.append(norm.name)
