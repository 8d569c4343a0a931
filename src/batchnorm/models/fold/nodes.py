"""What the nodes of torch.fx do: which operation, with which arguments, and where values go."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from batchnorm.models.capture import written_by_schema
from batchnorm.models.fold.graph import Shape, kept, permuted, reshaped

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONVOLUTION[:5], "output_padding", "groups", "dilation")
#: The arguments of functions of C++ that do not say them.
_ARGUMENTS = {
    **{f"conv{rank}d": _CONVOLUTION for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _TRANSPOSED for rank in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "dropout": ("input", "p", "train"),
    "pad": ("input", "pad", "mode", "value"),
    "batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "", "eps"),
}
CONVOLUTIONS = {name for name in _ARGUMENTS if name.startswith("conv")}
_TRANSPOSES = {"permute", "transpose", "t", "T", "mT", "movedim", "swapaxes", "swapdims"}
_RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as",
    "_unsafe_view",
}  # fmt: skip
_COPIES = {
    "contiguous", "clone", "detach", "alias", "to", "_to_copy", "float", "double", "half",
    "bfloat16", "type_as",
}  # fmt: skip
_DROPOUTS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout",
}  # fmt: skip
_POOLS = {f"adaptive_avg_pool{rank}d" for rank in (1, 2, 3)}
_PADS = {f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)}
_LIKE = {"reshape_as", "view_as", "type_as"}
_PROPERTIES = {"device", "dtype", "is_cpu", "is_cuda", "is_xpu", "layout", "ndim", "shape"}
_WRITING_OPERATORS = {
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
    "isub", "itruediv", "ixor", "setitem", "__setitem__",
}  # fmt: skip
_SIZES = {
    "size",
    "sym_size",
    "sym_numel",
    "sym_stride",
    "dim",
    "numel",
    "_assert_tensor_metadata",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
}


def called(node: fx.Node) -> str:
    """Return the name of what a node calls, if torch has it; with where it is from, if not."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        overload = getattr(target, "_qualified_op_name", None) or str(target._schema.name)
        return str(overload).split(".")[0].removeprefix("aten::")
    if target is getattr:
        return str(node.args[1])
    name = str(getattr(target, "__name__", target))
    module = getattr(target, "__module__", None) or "torch"
    return name if module.split(".")[0] in ("torch", "_operator") else f"{module}.{name}"


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a node, by their names, as far as these are known."""
    target = node.target
    if isinstance(target, str) or node.op != "call_function":
        return dict(node.kwargs)
    if isinstance(target, torch._ops.OpOverload):
        names: Iterable[str] = [argument.name for argument in target._schema.arguments]
    elif inspect.isfunction(target):
        names = inspect.signature(target).parameters
    else:
        names = _ARGUMENTS.get(called(node), ())
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def tensor_of(node: fx.Node) -> Tensor | None:
    """Return the tensor without values that stands for what a node returns, if that is one."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def shape_of(node: fx.Node) -> Shape | None:
    """Return the sizes of what a node returns, if they are known."""
    tensor = tensor_of(node)
    if tensor is None:
        return None
    return tuple(size if isinstance(size, int) else size.node.expr for size in tensor.shape)


def read_by(node: fx.Node) -> list[fx.Node]:
    """Return the nodes of which a node reads the values, and not their sizes or types alone."""
    name = called(node)
    if node.target is getattr and name in _PROPERTIES:
        return []
    return [] if name in _SIZES else node.all_input_nodes[: 1 if name in _LIKE else None]


def casts(node: fx.Node) -> bool:
    """Return whether a node changes nothing but the type, if that."""
    return called(node) in _COPIES and len(node.all_input_nodes) == 1


def writes(node: fx.Node) -> bool:
    """Return whether a node may write over what it reads."""
    target, name = node.target, called(node)
    if (written := written_by_schema(node)) is not None:
        return any(value is not None for value in written)
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return True  # nobody knows
    arguments = arguments_of(node)
    return (
        name in _WRITING_OPERATORS
        or (name.endswith("_") and not name.endswith("__"))
        or bool(arguments.get("inplace"))
        or arguments.get("out") is not None
    )


def order_of(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """Return how a node orders the dimensions anew, if that is what it does.

    Args:
        node: The node.
        rank: The number of dimensions.
    """
    if called(node) not in _TRANSPOSES or len(node.all_input_nodes) != 1:
        return None
    # sizes that tell which dimension is which
    numbered, name = torch.empty(tuple(range(rank)), device="meta"), node.target
    function = getattr(torch.Tensor, name) if isinstance(name, str) else name
    return tuple(function(numbered, *node.args[1:], **node.kwargs).shape)


def dims_of(node: fx.Node, source: fx.Node) -> dict[int, int] | None:
    """Return where dimensions go, if a node moves, repeats or averages values, and no more.

    Args:
        node: The node.
        source: What it reads.
    """
    name, before, after = called(node), shape_of(source), shape_of(node)
    if before is None or after is None:
        return None
    order = order_of(node, len(before))
    if order is not None:
        return permuted(order)
    arguments = [*node.args, *node.kwargs.values()]
    if name in _RESHAPES and not any(isinstance(a, torch.dtype) for a in arguments):
        return reshaped(before, after)
    named = arguments_of(node)
    if name in _COPIES | _POOLS or (
        name in _DROPOUTS and named.get("training", named.get("train")) is False
    ):
        return kept(before, after)
    if name == "mean":
        return _averaged(node, len(before))
    if name == "pad" and named.get("mode", "constant") != "constant":
        return _padded(named.get("pad"), before, after)
    return _padded(named.get("padding"), before, after) if name in _PADS else None


def _averaged(node: fx.Node, rank: int) -> dict[int, int]:
    """Return where the dimensions are over which no mean is taken."""
    numbered, name = torch.empty(tuple(range(2, 2 + rank)), device="meta"), node.target
    function = getattr(torch.Tensor, name) if isinstance(name, str) else name
    sizes = list(function(numbered, *node.args[1:], **node.kwargs).shape)
    return {size - 2: after for after, size in enumerate(sizes) if size != 1}


def _padded(amounts: Any, before: Shape, after: Shape) -> dict[int, int]:
    """Return the dimensions that are not padded; cut on one side and padded on another, one is."""
    if amounts is None or not all(isinstance(amount, int) and amount >= 0 for amount in amounts):
        return {}
    return kept(before, after)


def module_paths(node: fx.Node) -> list[str]:
    """Return the modules whose forward made a node, each as the code names it; innermost last."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def module_path(node: fx.Node) -> str | None:
    """Return the innermost of them; None if it was that of the model itself."""
    return next(reversed(module_paths(node)), None)
