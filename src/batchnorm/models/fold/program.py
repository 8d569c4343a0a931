"""Folding in programs of `torch.export`: another graph, signature and state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from batchnorm.models.batches import Buffers
from batchnorm.models.fold import nodes
from batchnorm.models.fold.choose import chosen
from batchnorm.models.fold.copies import cloned, seeded
from batchnorm.models.fold.fx import BATCH_NORMS, BY_THE_BATCH, Reader
from batchnorm.models.fold.graph import Map
from batchnorm.models.fold.plan import Plan
from batchnorm.models.fold.program_editor import ProgramEditor
from batchnorm.models.walk import Where

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class ProgramForm:
    """A program of `torch.export`, what it computes, and how it is folded.

    Args:
        program: The program; it is left as it is.
        example: The arguments of a call; None for those that it brings.
        keywords: The keywords of that call.
        where: Which layers may be folded.
        is_verified: Whether what is folded is run.

    Attributes:
        graph: What it computes.
        tensors: Its tensors, by name.
        names: The layers that may be folded.
        left: Why others cannot be.
        expected: What it returns.
    """

    def __init__(
        self,
        program: ExportedProgram,
        example: Sequence[Any] | None,
        keywords: Mapping[str, Any],
        where: Where,
        is_verified: bool,
    ) -> None:
        self._program, signature = program, program.graph_signature
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in (*program.constants.items(), *program.state_dict.items())
            if isinstance(tensor, Tensor)
        }
        reader = Reader(self.tensors)
        reader.read(
            program.graph,
            {
                node: targets[node.name]
                for node in program.graph.nodes
                if targets.get(node.name) in self.tensors
            },
        )
        self.graph = reader.graph
        self.graph.gives_biases = True
        _check_mode(program.graph_module, self.graph.stuck)
        for written in signature.buffers_to_mutate.values():
            self.graph.fixed[written] = "is written by the program"
        for name, calls in self.graph.norms.items():
            if any(tensor in self.graph.fixed for tensor in calls[0].names):
                self.graph.stuck[name] = "the program moves its statistics"
        inner = {
            node.name: "it is in a branch of the program, or in a part with a mode of its own"
            for module in program.graph_module.modules()
            if isinstance(module, fx.GraphModule) and module is not program.graph_module
            for node in module.graph.nodes
            if nodes.called(node) in BATCH_NORMS
        }
        self.names = chosen([*self.graph.norms, *inner], where)
        self.left = {name: reason for name, reason in inner.items() if name in self.names}
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        if example is not None:
            self._call = tuple(example), dict(keywords)
        elif program.example_inputs is not None:
            self._call = program.example_inputs
        self.expected = self.run(program) if is_verified else None

    def run(self, program: ExportedProgram) -> Any:
        """Return what a program returns for the example."""
        if self._call is None:
            raise ValueError(
                "the program brings no example inputs: pass the arguments of a call, or "
                "verify=False"
            )
        args, keywords = cloned(self._call)
        module = program.module()  # which has the program's own buffers
        buffers = Buffers(module)
        try:
            with torch.no_grad(), seeded(self.tensors.values()):
                return cloned(module(*args, **keywords))
        finally:
            buffers.restore()

    def apply(self, plan: Plan) -> ExportedProgram:
        """Return another program with the batch norms of a plan folded."""
        new = ProgramEditor(self._program)
        for op in self.graph.ops:
            folding = plan.foldings.get(op.weight) if isinstance(op, Map) else None
            if folding is not None and isinstance(op, Map):
                new.set(op.weight, folding.weight)
                if folding.bias is None:
                    continue
                if op.bias is not None and self.graph.has_own_bias(op):
                    new.set(op.bias, folding.bias)
                else:
                    new.give_bias(op, folding.bias)
        for name in plan.folded:
            for call in self.graph.norms[name]:
                new.take_out(call.node)
        for name in plan.folded:
            for tensor in self.graph.norms[name][0].names:
                if tensor is not None:
                    new.forget(tensor)
            new.forget(f"{name}.num_batches_tracked" if name else "num_batches_tracked")
        return new.program()


def _check_mode(module: fx.GraphModule, stuck: Mapping[str, str]) -> None:
    """Raise ValueError if a program was exported in training."""
    trained = [name for name, reason in stuck.items() if reason == BY_THE_BATCH]
    drops = [
        node.name
        for node in module.graph.nodes
        if "dropout" in nodes.called(node) and nodes.arguments_of(node).get("train") is True
    ]
    if trained or drops:
        raise ValueError(
            f"{(trained or drops)[0]!r} was exported in training mode, where there is nothing to "
            "fold: call model.eval() before torch.export.export"
        )
