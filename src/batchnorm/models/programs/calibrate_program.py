"""Calibrating a program of `torch.export`: meanwhile its batch norms are layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from batchnorm.layers import BatchNorm
from batchnorm.models.calibrate import calibrate
from batchnorm.models.files import FileError
from batchnorm.models.programs.inputs import inputs_of_program
from batchnorm.models.programs.moved import Moved, ProgramReport, Statistics

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Norm:
    """A batch norm in a graph.

    Attributes:
        name: What the layer is called.
        node: Its node.
        mean: The name of its running mean in the program, or None where that is no buffer.
        var: Likewise, of its running variance.
        eps: Added to the variance.
        training: Whether the batch's moments normalize.
        tracked: Whether there are running statistics at all.
    """

    name: str
    node: fx.Node
    mean: str | None
    var: str | None
    eps: float
    training: bool
    tracked: bool


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


def calibrate_program(
    program: ExportedProgram,
    batches: Iterable[Sequence[Tensor]],
    *,
    max_batches: int | None = None,
) -> ProgramReport:
    """Set the statistics of a program's batch norms to the exact moments of data.

    As `batchnorm.calibrate` does: each layer is normalized by the moments of its batch, and those
    of all batches merge exactly.

    Args:
        program: The program, exported in evaluation; changed in place.
        batches: The values of the inputs, of one call after the other.
        max_batches: How many calls at most.

    Returns:
        What moved, and what was left, with the reason.

    Raises:
        FileError: It has no batch norms, or was exported in training.
    """
    arguments = inputs_of_program(program).arguments
    unlifted = program.module(check_guards=False)
    # what runs without gradients is a graph of the program itself there, which must stay as it is
    tensors = [*unlifted.parameters(), *unlifted.buffers(), *program.constants.values()]
    unlifted = copy.deepcopy(unlifted, {id(tensor): tensor for tensor in tensors})
    found = norms(unlifted)
    if not found:
        raise FileError("it has no batch norm; folded ones are gone")
    report = ProgramReport()
    layers: dict[str, BatchNorm] = {}
    kept: dict[str, Statistics] = {}
    values: dict[str, int] = {}
    for norm in found:
        if norm.training and norm.tracked:
            raise FileError(
                f"{norm.name!r} was exported in training, and follows every batch: export "
                "model.eval()"
            )
        mean, var = (_state(program, name) for name in (norm.mean, norm.var))
        if not norm.tracked:
            report.left[norm.name] = "it has no running statistics"
        elif mean is None or var is None:
            report.left[norm.name] = "its statistics are computed in the program, or in a branch"
        else:
            if norm.name not in layers:
                layers[norm.name] = _layer(norm, mean, var)
                kept[norm.name] = mean, var
            _replace(norm, layers[norm.name], values)
    module = fx.GraphModule(unlifted, unlifted.graph)  # which has the modes of a module again
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            inner.recompile()
    module.add_module("calibrated", nn.ModuleList(layers.values()))

    def call(model: nn.Module, batch: Any) -> Any:
        args, keywords = arguments(batch)
        return model(*args, **keywords)

    done = calibrate(module, batches, call=call, max_batches=max_batches)
    report.batches = done.batches
    for at, (name, layer) in enumerate(layers.items()):
        reason = done.left.get(f"calibrated.{at}") or _unfit(_statistics(layer), kept[name])
        if reason is not None:
            report.left[name] = reason
            continue
        report.done.append(name)
        report.moved[name] = Moved.between(values[name], kept[name], _statistics(layer))
        for old, new in zip(kept[name], _statistics(layer), strict=True):
            old.copy_(new)
        tracked = _state(program, f"{name}.num_batches_tracked".lstrip("."))
        if tracked is not None and layer.num_batches_tracked is not None:
            tracked.copy_(layer.num_batches_tracked)
    return report


def statistics_of_program(program: ExportedProgram) -> dict[str, Statistics]:
    """Return the mean and the variance of each batch norm of a program that has them."""
    found: dict[str, Statistics] = {}
    for norm in norms(program.module(check_guards=False)):
        mean, var = (_state(program, name) for name in (norm.mean, norm.var))
        if mean is not None and var is not None:
            found[norm.name] = mean, var
    return found


def _state(program: ExportedProgram, name: str | None) -> Tensor | None:
    """Return what a program keeps under a name."""
    found = program.state_dict.get(name) if name is not None else None
    if found is None and name is not None:
        found = program.constants.get(name)
    return found if isinstance(found, Tensor) else None


def _statistics(layer: BatchNorm) -> tuple[Tensor, Tensor]:
    return layer.get_buffer("running_mean"), layer.get_buffer("running_var")


def _unfit(found: Statistics, kept: Statistics) -> str | None:
    """Return why statistics cannot be kept in the type that others have; None if they can."""
    for kind, new, old in zip(("mean", "variance"), found, kept, strict=True):
        if not bool(new.to(old.dtype).isfinite().all()):
            return f"its {kind} does not fit {str(old.dtype).removeprefix('torch.')}"
    return None


def _layer(norm: Norm, mean: Tensor, var: Tensor) -> BatchNorm:
    """Return a layer with the statistics of the program, in a type in which they can be merged."""
    layer = BatchNorm(len(mean), norm.eps, affine=False)
    wide = torch.promote_types(mean.dtype, torch.float32)
    layer.running_mean, layer.running_var = mean.to(wide, copy=True), var.to(wide, copy=True)
    return layer


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
