"""Folding in modules: what TorchDynamo captures says what may be, and a copy is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from batchnorm.layers import BankedBatchNorm, BatchNorm
from batchnorm.models.capture import capture
from batchnorm.models.fold import nodes
from batchnorm.models.fold.copies import cloned, copy_of, observed, revert_copy, seeded, set_values
from batchnorm.models.fold.fx import BY_THE_BATCH, Reader
from batchnorm.models.fold.graph import Map, Norm
from batchnorm.models.fold.inplace import ACTIVATIONS, overwriting
from batchnorm.models.fold.plan import Plan
from batchnorm.models.fold.remains import replace, what_remains
from batchnorm.models.walk import Where, batch_norms

#: The layers that take in a batch norm, and forward passes of which all is known.
_LINEAR = (_ConvNd, nn.Linear)
_FORWARDS = {
    layer.forward
    for layer in (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
        nn.ConvTranspose3d, nn.Linear, _BatchNorm, nn.SyncBatchNorm, BatchNorm,
    )
}  # fmt: skip


class ModuleForm:
    """A module, what it computes, and how it is folded.

    Args:
        model: The module, in evaluation; it is left as it is.
        example: The arguments of a call.
        keywords: Its keywords.
        where: Which layers may be folded.
        is_verified: Whether what is folded is run.
        inplace: Whether activations may write over what was folded.

    Attributes:
        graph: What it computes.
        tensors: Its tensors, by name.
        names: The layers that may be folded.
        left: Why others cannot be.
        expected: What it returns.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Sequence[Any],
        keywords: Mapping[str, Any],
        where: Where,
        is_verified: bool,
        inplace: bool,
    ) -> None:
        for name, module in model.named_modules():
            if module.training:
                raise ValueError(
                    f"{name or 'the model'!r} is in training mode, in which there is nothing to "
                    "fold: call model.eval() first"
                )
        self._model, self._example, self._keywords = model, tuple(example), dict(keywords)
        self._is_verified, self._inplace = is_verified, inplace
        work, not_converted = copy_of(model)
        self._modules = dict(work.named_modules())
        self.tensors: dict[str, Tensor] = {
            **dict(work.named_parameters(remove_duplicate=False)),
            **dict(work.named_buffers(remove_duplicate=False)),
        }
        self.names = list(batch_norms(work, where, alike=True))
        noted = (*_LINEAR, _BatchNorm, *ACTIVATIONS)
        layers = {n: m for n, m in self._modules.items() if isinstance(m, noted)}
        with observed(layers) as self._calls:
            self.expected = self.run(work)
        reader = Reader(self.tensors)
        with torch.no_grad(), seeded(self.tensors.values()):
            args, kwargs = self._arguments()
            for captured in capture(work, args, kwargs)[0]:
                reader.read(captured.graph, captured.names)
        self.graph = reader.graph
        self._note_problems()
        for name in self.names:
            if name in not_converted:
                self.graph.stuck[name] = not_converted[name]
        called = self.graph.norms
        self.left = {
            name: self.graph.stuck.get(name) or self._unseen(name)
            for name in self.names
            if name not in called
        }

    def run(self, model: nn.Module) -> Any:
        """Return what a model returns for the example."""
        args, keywords = self._arguments()
        with torch.no_grad(), seeded(self.tensors.values()):
            return cloned(model(*args, **keywords))

    def apply(self, plan: Plan) -> nn.Module:
        """Return a copy of the model with the batch norms of a plan folded."""
        model, _ = copy_of(self._model)
        modules = dict(model.named_modules())
        for name, folding in plan.foldings.items():
            owner, _, attribute = name.rpartition(".")
            weight: Tensor = getattr(modules[owner], attribute)
            set_values(weight, folding.weight)
            if folding.op.bias is not None and folding.bias is not None:
                owner, _, attribute = folding.op.bias.rpartition(".")
                set_values(getattr(modules[owner], attribute), folding.bias)
            elif folding.bias is not None:
                bias = folding.bias.to(weight.device, weight.dtype)
                modules[owner].bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
        for name in plan.folded:
            replace(modules[name], what_remains(modules[name], max(self._calls[name]) > 1))
        if self._inplace:
            for name in overwriting(self.graph, plan, modules, self._calls):
                modules[name].inplace = True
        revert_copy(model, self._model)
        return model

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cloned(self._example), cloned(self._keywords)

    def _unseen(self, name: str) -> str:
        """Return why there is no call of a layer in the graphs."""
        layer = self._modules[name]
        if name not in self._calls:
            return "the example does not reach it"
        if isinstance(layer, BatchNorm) and layer.statistics == "batch":
            return BY_THE_BATCH
        if isinstance(layer, BatchNorm) and layer.update == "always":
            return "its statistics follow the data in evaluation, too"
        return "TorchDynamo captures no graph in which it is called"

    def _note_problems(self) -> None:
        """Note what the graphs do not say: who else has a tensor, and what a module does beside."""
        holders: dict[int, list[str]] = {}
        for path, module in self._modules.items():
            for tensors in (module._parameters, module._buffers):
                for attribute, tensor in tensors.items():
                    if tensor is not None:
                        name = f"{path}.{attribute}" if path else attribute
                        holders.setdefault(id(tensor), []).append(name)
        for name, tensor in self.tensors.items():
            others = [other for other in holders.get(id(tensor), ()) if other != name]
            if others:
                self.graph.fixed[name] = f"is {others[0]!r}, too"
        for name, found in self.graph.norms.items():
            reason = self._norm_problem(name, found)
            if reason is not None:
                self.graph.stuck.setdefault(name, reason)
        for op in self.graph.ops:
            if isinstance(op, Map):
                self._note_map(op)

    def _norm_problem(self, name: str, found: list[Norm]) -> str | None:
        module = self._modules.get(name)
        if not isinstance(module, _BatchNorm):
            return "it is no module that could be taken out"
        shared = found[0].names[0]
        if shared in self.graph.fixed:
            return f"{shared!r} {self.graph.fixed[shared]}"
        if len(self._calls.get(name, ())) > len(found):
            return "it is called where TorchDynamo captures no graph, too"
        if len(self._calls.get(name, ())) < len(found):
            return "its statistics are used without a call of it"
        for path, parent in self._modules.items():
            if isinstance(parent, BankedBatchNorm) and name.startswith(f"{path}."):
                return "another bank may take its place"
        for tensor in found[0].names:  # which the module will not have any more
            for op in () if tensor is None else self.graph.uses[tensor]:
                if not isinstance(op, Norm):
                    return f"{op.what} reads {tensor!r}, too"
        if _is_known(module):
            return None
        paths, own = {nodes.module_path(call.node) for call in found}, [c.node for c in found]
        for node in (node for call in found for node in call.node.graph.nodes):
            if paths & set(nodes.module_paths(node)) and node.op[:4] == "call" and node not in own:
                return f"it does more than normalize: {nodes.called(node)}"
        return None

    def _note_map(self, op: Map) -> None:
        path = op.weight.rpartition(".")[0]
        owner, calls = self._modules.get(path), len(self._calls.get(path, ()))
        if calls > len(self.graph.uses[op.weight]):
            self.graph.fixed[op.weight] = "is used where TorchDynamo captures no graph, too"
        if op.bias is not None:
            return
        if not isinstance(owner, _LINEAR) or calls < len(self.graph.uses[op.weight]):
            op.refuses_bias = "its weight is used without a call of it"
        elif not (self._is_verified or _is_known(owner)):
            op.refuses_bias = "whether its forward adds one is not verified"


def _is_known(module: nn.Module) -> bool:
    return type(module).forward in _FORWARDS and "forward" not in vars(module)
