"""A program as it would be trained: what `memory_report` is asked about."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional as F

from batchnorm.models.files import FileError
from batchnorm.models.programs.layered import norms

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_aten = torch.ops.aten
#: What operators are called in a model's source; they take the same first arguments.
_FUNCTIONS: dict[Any, tuple[Any, int]] = {
    _aten.relu.default: (F.relu, 1),
    _aten.relu_.default: (torch.relu_, 1),
    _aten.leaky_relu.default: (F.leaky_relu, 2),
    _aten.leaky_relu_.default: (F.leaky_relu_, 2),
    _aten.elu.default: (F.elu, 2),
    _aten.elu_.default: (F.elu_, 2),
    _aten.silu.default: (F.silu, 1),
    _aten.gelu.default: (F.gelu, 1),
    _aten.relu6.default: (F.relu6, 1),
    _aten.hardswish.default: (F.hardswish, 1),
    _aten.sigmoid.default: (torch.sigmoid, 1),
    _aten.tanh.default: (torch.tanh, 1),
    _aten.add.Tensor: (torch.add, 2),
    _aten.add_.Tensor: (operator.iadd, 2),
}
#: Whether they drop is their third argument.
_DROPPING = (_aten.dropout.default, _aten.dropout_.default)
#: What relu6 becomes when it is exported, with the bounds 0 and 6.
_CLAMPED = (_aten.hardtanh.default, _aten.hardtanh_.default)


def training_module(program: ExportedProgram) -> fx.GraphModule:
    """Return a program as a module in training, with the calls that a model's source has.

    Batch norms normalize by the batch, dropout drops where the program still has it, and all
    parameters ask for a gradient.

    Args:
        program: The program, of which the module has the parameters and buffers.

    Raises:
        FileError: It has no batch norm.
    """
    unlifted = program.module(check_guards=False)
    found = norms(unlifted)
    if not found:
        raise FileError("it has no batch norm; folded ones are gone")
    for norm in found:
        _train(norm.node)
    for node in unlifted.graph.nodes:
        if node.target in _DROPPING:
            node.args = (*node.args[:2], True)
        if node.target in _CLAMPED and node.args[1:] == (0.0, 6.0):
            node.target, node.args = F.relu6, node.args[:1]
        function, taken = _FUNCTIONS.get(node.target, (None, 0))
        if function is not None and len(node.args) == taken and not node.kwargs:
            node.target = function
    module = fx.GraphModule(unlifted, unlifted.graph)
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            inner.recompile()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return module


def _train(node: fx.Node) -> None:
    """Let a batch norm be that of `torch.nn.functional`, and normalize by the batch."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    x, weight, bias, mean, var = (
        given.get(name) for name in ("input", "weight", "bias", "running_mean", "running_var")
    )
    node.target, node.kwargs = F.batch_norm, {}
    node.args = (x, mean, var, weight, bias, True, 0.1, given.get("eps", given.get("epsilon")))
    if len(schema.returns) > 1:
        for user in list(node.users):  # the only output of interest is the first
            if user.target is operator.getitem and user.args[1] == 0:
                user.replace_all_uses_with(node)
                node.graph.erase_node(user)
