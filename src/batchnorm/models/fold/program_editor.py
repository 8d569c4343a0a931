"""Editing programs of `torch.export`: graph, signature and state dict together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from batchnorm.models.fold import nodes
from batchnorm.models.fold.graph import Map

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class ProgramEditor:
    """Edits a copy of a program.

    Args:
        program: The program; it is left as it is.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.before = program
        self.module = copy.deepcopy(program.graph_module)
        self.graph = self.module.graph
        self.signature = copy.deepcopy(program.graph_signature)
        self.state, self.constants = dict(program.state_dict), dict(program.constants)
        self.nodes = dict(zip(program.graph.nodes, self.graph.nodes, strict=True))
        for before, node in self.nodes.items():
            node.name = before.name  # a copy gives others to what is called as Python's own
        self.placeholders = {
            node.name: node for node in self.graph.nodes if node.op == "placeholder"
        }
        self.biases: dict[str, fx.Node] = {}

    def set(self, name: str, values: Tensor) -> None:
        """Give a tensor other values."""
        home: dict[str, Any] = self.state if name in self.state else self.constants
        before = home[name]
        home[name] = _like(before, values.to(before.device, before.dtype))

    def give_bias(self, op: Map, values: Tensor) -> None:
        """Give a linear map that has no bias of its own one, as a tensor beside its weight."""
        if op.weight not in self.biases:
            self.biases[op.weight] = self._placeholder(op.weight, values)
        node, bias = self.nodes[op.node], self.biases[op.weight]
        if op.what == "mm":
            node.target, node.args = torch.ops.aten.addmm.default, (bias, *node.args)
        elif op.what == "addmm":
            node.args = (bias, *node.args[1:])
        else:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "bias"}
            node.args = (*node.args[:2], bias, *node.args[3:])

    def _placeholder(self, weight: str, values: Tensor) -> fx.Node:
        from torch.export.graph_signature import InputSpec, TensorArgument

        at = next(i for i, s in enumerate(self.signature.input_specs) if s.target == weight)
        spec = self.signature.input_specs[at]
        home: dict[str, Any] = self.state if weight in self.state else self.constants
        target = f"{weight.removesuffix('weight').removesuffix('.')}.bias".removeprefix(".")
        while target in self.state or target in self.constants:
            target += "_folded"
        home[target] = _like(home[weight], values.to(home[weight].device, home[weight].dtype))
        beside = self.placeholders[spec.arg.name]
        with self.graph.inserting_after(beside):
            node: fx.Node = self.graph.placeholder(f"p_{target.replace('.', '_')}")
        node.meta["val"] = beside.meta["val"].new_empty(tuple(values.shape))
        new = InputSpec(spec.kind, TensorArgument(name=node.name), target, spec.persistent)
        self.signature.input_specs.insert(at + 1, new)
        return node

    def take_out(self, before: fx.Node) -> None:
        """Let what reads a batch norm's output read its input."""
        norm = self.nodes[before]
        source = nodes.arguments_of(norm)["input"]
        outputs = [norm]
        if isinstance(norm.meta.get("val"), tuple | list):  # of which the first is what matters
            outputs = [user for user in norm.users if user.args[1] == 0]
        for output in outputs:
            output.replace_all_uses_with(source)
            for spec in self.signature.output_specs:
                if getattr(spec.arg, "name", None) == output.name:
                    spec.arg.name = source.name
        for node in (*norm.users, norm):
            self.graph.erase_node(node)

    def forget(self, name: str) -> None:
        """Remove a tensor that nothing reads any more."""
        for at, spec in enumerate(self.signature.input_specs):
            if spec.target == name:
                node = self.placeholders[spec.arg.name]
                if self._erase(node):
                    del self.signature.input_specs[at]
                    for home in (self.state, self.constants):
                        home.pop(name, None)
                return

    def _erase(self, node: fx.Node) -> bool:
        """Erase what nothing reads, and what only checks or copies it; return whether that did."""
        for user in list(node.users):
            if nodes.casts(user) or not nodes.read_by(user):
                self._erase(user)
        if not node.users:
            self.graph.erase_node(node)
        return not node.users

    def program(self) -> ExportedProgram:
        """Return the program."""
        from torch.export import ExportedProgram

        self.graph.lint()
        self.module.recompile()
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state,
            range_constraints=copy.deepcopy(self.before.range_constraints),
            module_call_graph=copy.deepcopy(self.before.module_call_graph),
            example_inputs=self.before.example_inputs,
            constants=self.constants,
            verifiers=self.before.verifiers,
        )


def _like(before: Tensor, values: Tensor) -> Tensor:
    """Return values as a parameter, if that is what was there."""
    values = torch.empty_like(before).copy_(values) if values.shape == before.shape else values
    if isinstance(before, nn.Parameter):
        return nn.Parameter(values.detach(), before.requires_grad)
    return values.detach()
