"""What the nodes of a captured graph do: which change memory, which are an addition, an activation.

Nodes are compared by the storages of the tensors that stand for them, so that a view, or what an
operation in place returns, is known for what it is.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from batchnorm.kernels.activations import NAMES
from batchnorm.models.capture import example_of, is_batch_norm, written_by_schema

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_ADDING_METHODS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
#: Of `torch.nn.functional.batch_norm`, and of `torch.batch_norm`.
ARGUMENTS = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip
_ARGUMENTS_IN_C = (
    "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
    "cudnn_enabled",
)  # fmt: skip
_ARGUMENTS_OF_OURS = (
    "input", "weight", "bias", "residual", "mask", "running_mean", "running_var",
)  # fmt: skip
_SETTING = (operator.setitem, operator.delitem)

#: What an activation is called in a graph: its name here, and the argument after the tensor that is
#: its parameter, with that one's default.
_FUNCTIONS: dict[Any, tuple[str, str | None, float | None]] = {
    F.relu: ("relu", None, None),
    F.leaky_relu: ("leaky_relu", "negative_slope", 0.01),
    F.elu: ("elu", "alpha", 1.0),
    F.silu: ("silu", None, None),
    F.gelu: ("gelu", None, None),
    F.relu6: ("relu6", None, None),
    F.hardswish: ("hardswish", None, None),
    F.sigmoid: ("sigmoid", None, None),
    F.tanh: ("tanh", None, None),
    torch.relu: ("relu", None, None),
    torch.relu_: ("relu", None, None),
    F.relu_: ("relu", None, None),
    F.leaky_relu_: ("leaky_relu", "negative_slope", 0.01),
    F.elu_: ("elu", "alpha", 1.0),
    torch.sigmoid: ("sigmoid", None, None),
    torch.sigmoid_: ("sigmoid", None, None),
    torch.tanh: ("tanh", None, None),
    torch.tanh_: ("tanh", None, None),
}
_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"}


def parts_of(module: fx.GraphModule) -> list[fx.GraphModule]:
    """Return a graph, and those in it that are under a checkpoint."""
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


def storage_of(node: Any) -> int | None:
    """Return what stands for the memory of a node's tensor; views of one have the same."""
    return _memory(example_of(node)) if isinstance(node, fx.Node) else None


def memory_of(node: fx.Node) -> set[int]:
    """Return the memory of all that a node returns, which may be several tensors."""
    return {memory for v in _flat(node.meta.get("example_value")) if (memory := _memory(v))}


def _memory(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except NotImplementedError:  # inside a transform of `torch.func`
        return None


def written_by(node: fx.Node) -> set[int]:
    """Return the memory that a node changes."""
    written: list[Any] = [node.kwargs.get("out")]
    first = node.args[0] if node.args else node.kwargs.get("input")
    if is_batch_norm(node):
        arguments = arguments_of(node)
        if arguments["training"]:
            written += [arguments["running_mean"], arguments["running_var"]]
    elif node.op == "call_method":
        name = str(node.target)
        if (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
            written.append(first)
    elif (by_schema := written_by_schema(node)) is not None:
        written += by_schema
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        module = getattr(node.target, "__module__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or (
            module == "_operator" and name[:1] == "i" and hasattr(operator, name[1:])  # as iadd
        )
        if in_place or node.target in _SETTING or _bound(node).get("inplace"):
            written.append(first)
    return {s for value in _flat(written) if (s := storage_of(value)) is not None}


def _flat(values: Any) -> Iterator[Any]:
    """Return what is in lists in each other, as `torch._foreach_add_` takes and `out=` is."""
    if isinstance(values, tuple | list):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def is_barrier(node: fx.Node) -> bool:
    """Return whether what a node does is not seen in what it returns: it sets a mode, say."""
    if node.op in ("placeholder", "get_attr", "output") or written_by(node):
        return False
    if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return not memory_of(node) and not _is_plain(node)


def _is_plain(node: fx.Node) -> bool:
    """Return whether a node computes something that is no tensor."""
    module = getattr(node.target, "__module__", "") or ""
    if module in ("_operator", "math", "builtins") and node.target not in _SETTING:
        return True
    return node.op == "call_method" and str(node.target) in ("size", "dim", "numel", "stride")


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of a batch norm, by their names."""
    if is_operator(node):
        return dict(zip(_ARGUMENTS_OF_OURS, node.args, strict=False))
    names = ARGUMENTS if node.target is F.batch_norm else _ARGUMENTS_IN_C
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_operator(node: fx.Node) -> bool:
    """Return whether a node calls a layer of ours, as a compiler sees it in training."""
    return node.target is torch.ops.batchnorm.forward.default


def value_of(node: fx.Node) -> fx.Node | None:
    """Return the node that has what a batch norm returns, if a node calls one."""
    if is_batch_norm(node):
        return node
    if not is_operator(node):
        return None
    return next((n for n in node.users if n.target is operator.getitem and n.args[1] == 0), None)


def operands_of(norm: fx.Node) -> tuple[Any, bool]:
    """Return the residual of a batch norm, and whether it has an activation, from the first."""
    return (norm.args[3], norm.args[10] is not None) if is_operator(norm) else (None, False)


def addend_of(node: fx.Node, value: fx.Node) -> fx.Node | str | None:
    """Return what a node adds to a value, or why that is no residual; None if it adds nothing."""
    if node.op == "call_method":
        adds = node.target in _ADDING_METHODS
    else:
        adds = node.op == "call_function" and node.target in _ADDITIONS
    if not adds:
        return None
    if node.kwargs.keys() - {"input", "other"}:
        return "the sum has an alpha or an out"
    terms = [*node.args, *node.kwargs.values()]
    others = [term for term in terms if term is not value]
    if len(terms) != 2 or len(others) != 1:
        return "it is added to itself"
    other = others[0]
    mine = example_of(value)
    tensor = example_of(other) if isinstance(other, fx.Node) else None
    if not isinstance(other, fx.Node) or tensor is None or mine is None:
        return "it is added to a number"
    if tensor.shape != mine.shape or tensor.device != mine.device:
        return "it is added to a tensor of another shape"
    if tensor.dtype != mine.dtype:
        return f"it is added to a tensor of {tensor.dtype}, and is of {mine.dtype}"
    if storage_of(other) == storage_of(value):
        return "it is added to itself"
    if (total := example_of(node)) is None or total.stride() != mine.stride():
        return "the sum lies in memory as the other tensor"
    if storage_of(other) in written_by(node):
        return "it is added in place to the other tensor"
    return other


def activation_of(node: fx.Node, value: fx.Node) -> tuple[str, float | None] | None:
    """Return the name and the parameter of the activation of a value that a node is, if it is."""
    if node.op == "call_method":
        if node.target not in _METHODS or len(node.args) != 1 or node.kwargs:
            return None
        name = str(node.target).rstrip("_")
        return (name, None) if name in NAMES else None
    given = _bound(node)
    if node.op != "call_function" or given.get("input") is not value:
        return None
    if node.target is F.hardtanh:  # which is what torch.nn.ReLU6 calls
        bounds = (given.get("min_val", -1.0), given.get("max_val", 1.0))
        return ("relu6", None) if bounds == (0, 6) and "relu6" in NAMES else None
    if node.target not in _FUNCTIONS:
        return None
    name, parameter, default = _FUNCTIONS[node.target]
    if name == "gelu" and given.get("approximate", "none") != "none":
        name = "gelu_tanh"
    others = given.keys() - {"input", "inplace", "approximate", parameter}
    if name not in NAMES or others or len(node.all_input_nodes) > 1:
        return None
    return name, None if parameter is None else given.get(parameter, default)


def is_identity(node: fx.Node) -> bool:
    """Return whether a node returns what it is given: dropout in evaluation."""
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    given = _bound(node)
    return given.get("training", True) is False or given.get("p", 0.5) == 0


_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
}  # fmt: skip


def is_elementwise(node: fx.Node) -> bool:
    """Return whether a node makes one tensor of others, cheaply, and the same at any time.

    Of several it is a product, whose backward pass keeps them anyway.
    """
    if written_by(node) or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        return False
    tensors = [v for v in node.args if isinstance(v, fx.Node)]
    if storage_of(node) is None or any(storage_of(v) is None for v in tensors):
        return False
    if node.target in _PRODUCTS:
        return True
    if node.args[:1] != tuple(tensors):
        return False
    return node.target in (_METHODS if node.op == "call_method" else {*_FUNCTIONS, *_OTHERS})


#: Activations that the layer does not have, and what else makes a tensor of one.
_OTHERS = {
    F.hardtanh, F.hardsigmoid, F.mish, F.softplus, F.selu, F.celu, F.softsign, F.logsigmoid, F.pad,
    torch._C._nn.pad,  # which is what torch.nn.functional.pad calls
}  # fmt: skip
_PRODUCTS = {operator.mul, torch.mul, "mul"}


def _bound(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by their names, as far as they are known."""
    names = _names(node.target) if callable(node.target) else ()
    known = dict(zip(names, node.args, strict=False))
    if len(node.args) > len(names):
        known["more"] = node.args[len(names) :]
    return {**known, **node.kwargs}


@cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of those in C
        return ("input", "negative_slope") if "leaky_relu" in str(function) else ("input", "alpha")
