"""Running an ONNX model so that it tells what its batch norms get, without keeping it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.models.batches import limited, progress_bar
from batchnorm.models.files import FileError
from batchnorm.models.programs.inputs import inputs_of_onnx
from batchnorm.models.programs.onnx_norms import Norm
from batchnorm.models.programs.running import checked_session_of
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from onnx import ModelProto

#: Where the functions below are, and what they need.
_DOMAIN, _LEAST_OPSET, _LEAST_IR = "batchnorm", 18, 8
#: What they return beside what the layer does, and the types of that, as ONNX numbers them.
_MOMENTS, _EACH = ("mean", "var", "count"), "each"
_FLOAT, _INTEGER, _DOUBLE = 1, 7, 11
#: A batch norm by the moments of its batch, in float64. One value a channel has no variance: there
#: the running statistics normalize.
_NORMALIZE = """
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
#: Of each example the means over its positions of a = (x - mean) / sqrt(var + eps) and of a^2, in
#: the type `kind`: (N, C, 2).
_TELL = """
<domain: "batchnorm", opset_import: [OPSET]>
Tell <eps, kind> (x, mean, var) => (of_each) {
    flat_shape = Constant <value_ints = [0, 0, -1]> ()
    positions = Constant <value_ints = [2]> ()
    over = Constant <value_ints = [1, -1, 1]> ()
    eps_32 = Constant <value_float: float = @eps> ()
    eps_wide = Cast <to: int = @kind> (eps_32)
    flat = Reshape (x, flat_shape)
    wide = Cast <to: int = @kind> (flat)
    mean_wide = Cast <to: int = @kind> (mean)
    mean_over = Reshape (mean_wide, over)
    var_wide = Cast <to: int = @kind> (var)
    var_over = Reshape (var_wide, over)
    raised = Add (var_over, eps_wide)
    deviation = Sqrt (raised)
    shifted = Sub (wide, mean_over)
    a = Div (shifted, deviation)
    first = ReduceMean <keepdims = 1> (a, positions)
    squares = Mul (a, a)
    second = ReduceMean <keepdims = 1> (squares, positions)
    of_each = Concat <axis = 2> (first, second)
}
"""


def observe(
    model: ModelProto,
    wanted: Sequence[Norm],
    batches: Iterable[Sequence[Tensor]],
    description: str,
    *,
    max_batches: int | None = None,
    hear_moments: Callable[[str, Moments], None] | None = None,
    hear_each: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> int:
    """Run a model, and let functions hear of what its batch norms get.

    Args:
        model: The model, which stays as it is.
        wanted: Which batch norms, with statistics that can be read.
        batches: The values of the inputs, of one call after the other.
        description: What is done.
        max_batches: How many calls at most.
        hear_moments: Takes the name of a layer and the moments of a batch, for each that is finite.
            If given, the layers are normalized by them, and not by the running statistics.
        hear_each: Takes, after each call, by the names of the layers, (examples, 2, C): of each
            example the means over its positions of a and of a^2, a = (x - mean) / std by the
            running statistics.

    Returns:
        How many calls there were.

    Raises:
        FileError: ONNX Runtime cannot run it.
    """
    session = checked_session_of(telling(model, wanted, hear_moments, hear_each))
    names = [tensor.name for tensor in inputs_of_onnx(model).tensors]
    wished = [*_MOMENTS] * (hear_moments is not None) + [_EACH] * (hear_each is not None)
    outputs = [_output(what, at) for at in range(len(wanted)) for what in wished]
    calls = 0
    with progress_bar(description, batches, max_batches, 1, True) as advance:
        for batch in limited(batches, max_batches):
            feeds = {name: value.numpy() for name, value in zip(names, batch, strict=True)}
            found = dict(zip(outputs, session.run(outputs, feeds), strict=False))
            if hear_moments is not None:
                for at, norm in enumerate(wanted):
                    moments = _moments(*(found[_output(what, at)] for what in _MOMENTS))
                    if moments is not None:
                        hear_moments(norm.name, moments)
            if hear_each is not None:
                told = {norm.name: found[_output(_EACH, at)] for at, norm in enumerate(wanted)}
                hear_each({n: torch.from_numpy(v).transpose(1, 2) for n, v in told.items()})
            calls += 1
            advance()
    return calls


def _output(what: str, at: int) -> str:
    """Return the name of what a function tells of a batch norm."""
    return f"{_DOMAIN}.{what}.{at}"


def telling(
    model: ModelProto, wanted: Sequence[Norm], hear_moments: object, hear_each: object
) -> ModelProto:
    """Return a copy of a model that returns what is to be heard, too.

    Args:
        model: The model.
        wanted: Which batch norms tell something.
        hear_moments: Unless it is None, they tell the moments of the batch, and normalize by them.
        hear_each: Unless it is None, they tell what `observe` says.
    """
    import onnx

    told = _copied(model)
    opset = f'"" : {_opset(told)}'
    told.functions.extend(
        onnx.parser.parse_function(function.replace("OPSET", opset))
        for function in (_NORMALIZE, _TELL)
    )
    told.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    told.ir_version = max(told.ir_version, _LEAST_IR)
    found = {norm.node.output[0]: (at, norm) for at, norm in enumerate(wanted)}
    kinds = dict(zip(_MOMENTS, (_DOUBLE, _DOUBLE, _INTEGER), strict=True))
    nodes = told.graph.node
    for place, node in reversed(list(enumerate(nodes))):  # so that places before it stay
        if node.op_type != "BatchNormalization" or node.output[0] not in found:
            continue
        at, norm = found[node.output[0]]
        made: dict[str, int] = {}
        if hear_each is not None:
            assert norm.arrays is not None  # or else it is not wanted
            kind = _DOUBLE if norm.arrays[0].dtype == np.float64 else _FLOAT
            x, _, _, mean, var = node.input
            made[_output(_EACH, at)] = kind
            tell = onnx.helper.make_node(
                "Tell", [x, mean, var], list(made), domain=_DOMAIN, eps=norm.eps, kind=kind
            )
            nodes.insert(place, tell)
        if hear_moments is not None:
            moments = {_output(what, at): kind for what, kind in kinds.items()}
            made |= moments
            normalize = onnx.helper.make_node(
                "Normalize", node.input, [node.output[0], *moments], domain=_DOMAIN, eps=norm.eps
            )
            node.CopyFrom(normalize)
        told.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in made.items()
        )
    return told


def _copied(model: ModelProto) -> ModelProto:
    """Return a copy of a model, in a version in which the functions can be written."""
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    if _opset(model) < _LEAST_OPSET:  # the copy alone: the model keeps its own
        try:
            copied = onnx.version_converter.convert_version(copied, _LEAST_OPSET)
        except Exception as error:  # of classes of its own
            raise FileError(
                f"the model is of opset {_opset(model)}, and onnx cannot convert it to "
                f"{_LEAST_OPSET}: export it with a later one"
            ) from error
    return copied


def _opset(model: ModelProto) -> int:
    return max(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _moments(mean: NDArray[Any], var: NDArray[Any], count: NDArray[Any]) -> Moments | None:
    """Return the moments of a batch, or None where there are none, or they are not finite."""
    values = int(count)
    if values == 0 or not (np.isfinite(mean).all() and np.isfinite(var).all()):
        return None
    flat = torch.from_numpy(mean).flatten(), torch.from_numpy(var).flatten()
    return Moments(values, flat[0], flat[1] * values)
