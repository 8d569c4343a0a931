"""A program of `torch.export` with layers in the place of its batch norms."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from batchnorm.layers import BatchNorm
from batchnorm.models.files import FileError
from batchnorm.models.programs.inputs import inputs_of_program
from batchnorm.models.programs.moved import Statistics

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The name of the program in its module, which no layer can have.
_GRAPH = "(graph)"


@dataclass(frozen=True)
class Norm:
    """A batch norm in a graph.

    Attributes:
        name: What the layer is called.
        node: Its node.
        mean: The name of its running mean in the program, or None where that is no buffer.
        var: Likewise, of its running variance.
        eps: Added to the variance.
        momentum: How much a batch counted in training; 0 where that is not known.
        training: Whether the batch's moments normalize.
        tracked: Whether there are running statistics at all.
    """

    name: str
    node: fx.Node
    mean: str | None
    var: str | None
    eps: float
    momentum: float
    training: bool
    tracked: bool


class LayeredProgram(nn.Module):
    """A program whose batch norms are layers, each under the name that it has in the program.

    What takes a module takes this one. It has the parameters of the program, and statistics of its
    own, in a type in which they can be merged.

    Args:
        program: The program, exported in evaluation. It stays as it is until `assign`.

    Attributes:
        layers: The layers, without an affine part, by name.
        left: The batch norms that are none, each with the reason.
        values: How many values a channel each layer got.

    Raises:
        FileError: It was exported in training.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self._arguments = inputs_of_program(program).arguments
        self.layers: dict[str, BatchNorm] = {}
        self.left: dict[str, str] = {}
        self.values: dict[str, int] = {}
        self._kept: dict[str, Statistics] = {}
        self._tracked: dict[str, Tensor] = {}
        unlifted = program.module(check_guards=False)
        # what runs without gradients is a graph of the program itself there, which must stay
        tensors = [*unlifted.parameters(), *unlifted.buffers(), *program.constants.values()]
        unlifted = copy.deepcopy(unlifted, {id(tensor): tensor for tensor in tensors})
        for norm in norms(unlifted):
            if norm.training and norm.tracked:
                raise FileError(
                    f"{norm.name!r} was exported in training, and follows every batch: export "
                    "model.eval()"
                )
            mean, var = (_state(program, name) for name in (norm.mean, norm.var))
            if not norm.tracked:
                self.left[norm.name] = "it has no running statistics"
            elif mean is None or var is None:
                self.left[norm.name] = "its statistics are computed in the program, or in a branch"
            else:
                if norm.name not in self.layers:
                    self.layers[norm.name] = layer = layer_of((mean, var), norm.eps, norm.momentum)
                    self._kept[norm.name] = mean, var
                    tracked = _state(program, f"{norm.name}.num_batches_tracked".lstrip("."))
                    if tracked is not None and layer.num_batches_tracked is not None:
                        self._tracked[norm.name] = tracked
                        layer.num_batches_tracked.copy_(tracked)
                _replace(norm, self.layers[norm.name], self.values)
        graph = fx.GraphModule(unlifted, unlifted.graph)  # which has the modes of a module again
        for inner in graph.modules():
            if isinstance(inner, fx.GraphModule):
                inner.recompile()
        # the names have dots, and may be empty
        self._modules.update({**self.layers, _GRAPH: graph})

    def forward(self, values: Sequence[Tensor]) -> Any:
        """Return what the program returns.

        Args:
            values: Those of its inputs, in their order.
        """
        args, keywords = self._arguments(values)
        return self._modules[_GRAPH](*args, **keywords)  # type: ignore[misc]

    def kept(self, name: str) -> Statistics:
        """Return what the program has for a layer: the very tensors."""
        return self._kept[name]

    def statistics(self, name: str) -> Statistics:
        """Return what the layer has."""
        layer = self.layers[name]
        return layer.get_buffer("running_mean"), layer.get_buffer("running_var")

    def assign(self, name: str) -> str | None:
        """Give the program what the layer has.

        Args:
            name: The layer.

        Returns:
            Why it cannot have that, or None: its type does not hold it.
        """
        pairs = list(zip(self._kept[name], self.statistics(name), strict=True))
        for kind, (old, new) in zip(("mean", "variance"), pairs, strict=True):
            if not bool(new.to(old.dtype).isfinite().all()):
                return f"its {kind} does not fit {str(old.dtype).removeprefix('torch.')}"
        for old, new in pairs:
            old.copy_(new)
        count = self.layers[name].num_batches_tracked
        if name in self._tracked and count is not None:
            self._tracked[name].copy_(count)
        return None


def layer_of(statistics: Statistics, eps: float, momentum: float) -> BatchNorm:
    """Return a layer that has statistics, in a type in which they can be merged.

    Args:
        statistics: Its running mean and variance, which are copied.
        eps: Added to the variance.
        momentum: How much a batch counted in training; out of (0, 1) for what is usual.
    """
    mean, var = statistics
    layer = BatchNorm(len(mean), eps, momentum if 0 < momentum < 1 else 0.1, affine=False)
    wide = torch.promote_types(mean.dtype, torch.float32)
    layer.running_mean, layer.running_var = mean.to(wide, copy=True), var.to(wide, copy=True)
    return layer


def statistics_of_program(program: ExportedProgram) -> dict[str, Statistics]:
    """Return the mean and the variance of each batch norm of a program that has them."""
    found: dict[str, Statistics] = {}
    for norm in norms(program.module(check_guards=False)):
        mean, var = (_state(program, name) for name in (norm.mean, norm.var))
        if mean is not None and var is not None:
            found[norm.name] = mean, var
    return found


def norms(module: fx.GraphModule) -> list[Norm]:
    """Return the batch norms of an unlifted program, also those that run without gradients."""
    return list(_norms(module, {}))


def _norms(module: fx.GraphModule, outer: dict[fx.Node, str]) -> Iterator[Norm]:
    names = dict(outer)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "call_function":
            arguments = _arguments(node)
            if "batch_norm" in str(node.target) and "running_mean" in arguments:
                mean, var, weight = (
                    names.get(value) if isinstance(value, fx.Node) else None
                    for value in map(arguments.get, ("running_mean", "running_var", "weight"))
                )
                if mean is not None:
                    name = mean.removesuffix("running_mean").removesuffix(".")
                else:
                    name = weight.rpartition(".")[0] if weight else node.name
                never = any(word in str(node.target) for word in ("no_training", "no_update"))
                yield Norm(
                    name,
                    node,
                    mean,
                    var,
                    float(arguments["eps"] if "eps" in arguments else arguments["epsilon"]),
                    float(arguments.get("momentum", 0)),
                    bool(arguments.get("training", not never)),
                    arguments["running_mean"] is not None,
                )
            for at, body in enumerate(node.args):
                inner = _graph_module(module, body)
                if inner is not None:  # its own arguments follow it
                    taken = inner.graph.find_nodes(op="placeholder")
                    given = zip(taken, node.args[at + 1 :], strict=False)
                    yield from _norms(inner, {i: names[o] for i, o in given if o in names})


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return what an operator is called with, by name; nothing for what is no operator."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}
    return {**given, **node.kwargs}


def _graph_module(module: fx.GraphModule, argument: Any) -> fx.GraphModule | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        found = getattr(module, str(argument.target), None)
        return found if isinstance(found, fx.GraphModule) else None
    return None


def _state(program: ExportedProgram, name: str | None) -> Tensor | None:
    """Return what a program keeps under a name."""
    found = program.state_dict.get(name) if name is not None else None
    if found is None and name is not None:
        found = program.constants.get(name)
    return found if isinstance(found, Tensor) else None


def _replace(norm: Norm, layer: BatchNorm, values: dict[str, int]) -> None:
    """Let a layer normalize in place of an operator.

    Args:
        norm: The operator.
        layer: The layer, without an affine part.
        values: Where the values a channel are counted.
    """
    arguments, name = _arguments(norm.node), norm.name
    schema = getattr(norm.node.target, "_schema")  # noqa: B009 (it has one)
    several = len(schema.returns) > 1

    def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
        values[name] = values.get(name, 0) + x.numel() // x.shape[1]
        y = layer(x)
        over = (-1, *[1] * (x.ndim - 2))
        if weight is not None:
            y = y * weight.to(y.dtype).view(over)
        if bias is not None:
            y = y + bias.to(y.dtype).view(over)
        return (y, None, None, None) if several else y

    norm.node.target = normalize
    norm.node.args = tuple(arguments.get(part) for part in ("input", "weight", "bias"))
    norm.node.kwargs = {}
