"""The graphs of a model, as TorchDynamo captures them: however its forward is written.

A graph has the operations that the model calls, with `torch.nn.functional.batch_norm` among them;
where the model does what cannot be captured, there are several graphs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

#: Models of one class share what is compiled of it; a tool is asked about more of them than this.
VERSIONS = 256


#: What is compiled here counts for no limit of what users compile, where torch can tell them apart.
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)


class Captured(NamedTuple):
    """A graph, and what it was called with.

    Attributes:
        module: The graph, to be called.
        inputs: What it was called with, a value for each of its placeholders.
        names: For each placeholder that is a parameter or a buffer, its name in the model; a
            tensor with several names has the first.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    names: dict[fx.Node, str]

    @property
    def graph(self) -> fx.Graph:
        """Its operations."""
        return self.module.graph


_captured: ContextVar[list[tuple[fx.GraphModule, tuple[Any, ...]]] | None] = ContextVar(
    "batchnorm_captured", default=None
)


def _note(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """Return what runs a graph as it is, and notes that it ran: a backend of `torch.compile`."""

    def run(*inputs: Any) -> Any:
        captured = _captured.get()
        if captured is not None:
            captured.append((module, inputs))
        return module(*inputs)

    return run


def unwrapped(model: nn.Module) -> nn.Module:
    """Return what `torch.compile` was given, if that returned the model.

    Raises:
        TypeError: It is no module.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}: expected a torch.nn.Module")
    return model


def arguments(example: Sequence[Any] | Tensor) -> tuple[Any, ...]:
    """Return the arguments of a call; a tensor is the only one.

    Raises:
        TypeError: It is neither a tensor nor a sequence.
    """
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, str | Mapping) or not isinstance(example, Sequence):
        raise TypeError(
            f"example is a {type(example).__name__}: expected a tensor, or a tuple of the "
            "arguments of a call; what goes by name goes into keywords="
        )
    return tuple(example)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Let the parts of a model that were compiled, by `compile` or as modules, run as written."""
    compiled = [
        (module, name, module.__dict__[name])
        for module in model.modules()
        for name in ("_compiled_call_impl", "forward")
        if module.__dict__.get(name) is not None
        and (name != "forward" or hasattr(module, "_orig_mod"))
    ]
    for module, name, _ in compiled:
        inside: Any = getattr(module, "_orig_mod", None)
        module.__dict__[name] = inside.__call__ if name == "forward" else None
    try:
        yield
    finally:
        for module, name, before in compiled:
            module.__dict__[name] = before


def capture(
    model: nn.Module,
    example: Sequence[Any] | Tensor,
    keywords: Mapping[str, Any] | None = None,
) -> tuple[list[Captured], Any]:
    """Call a model, and return its graphs in the order in which they ran, and what it returned.

    Args:
        model: The model, which is called as it is: in its mode, and moving its statistics.
        example: The arguments of the call.
        keywords: Its keywords.

    Raises:
        TypeError: The example is neither a tensor nor a sequence.
        ValueError: The model has no values.
    """
    from torch._dynamo import config  # all of the compiler, when it is first needed

    example = arguments(example)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"this {type(model).__name__} is on the device meta, which has no values to call it "
            'with: give it some, model.to_empty(device="cpu"), and load them'
        )

    token = _captured.set([])
    try:
        with (
            config.patch(
                recompile_limit=VERSIONS,
                accumulated_recompile_limit=VERSIONS,
                skip_nnmodule_hook_guards=False,  # another model of the class may have other hooks
            ),
            as_written(model),
        ):
            compiled = torch.compile(model, backend=_note, dynamic=False, **ISOLATED)
            result = compiled(*example, **(keywords or {}))
        ran = _captured.get() or []
    finally:
        _captured.reset(token)
    named = {
        id(tensor): name
        for name, tensor in reversed(
            (
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            )
        )
    }
    captured = []
    for module, inputs in ran:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        names = {
            node: named[id(value)]
            for node, value in zip(placeholders, inputs, strict=True)
            if id(value) in named
        }
        captured.append(Captured(module, inputs, names))
    return captured, result


def check_captured(captured: Sequence[Captured], model: nn.Module) -> None:
    """Raise RuntimeError if nothing was captured of a model."""
    if not captured:
        raise RuntimeError(
            f"TorchDynamo captured no graph of this {type(model).__name__}: it is switched off "
            "(TORCHDYNAMO_DISABLE, torch.compiler.disable), or the forward begins with what it "
            "cannot capture"
        )


def module_of(node: fx.Node) -> str:
    """Return the name of the innermost module whose forward made a node, as the model has it.

    It is empty for the model itself.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"^L\['\w+'\]\.?", "", str(path))
    return path.removeprefix("_orig_mod").removeprefix(".")


def written_by_schema(node: fx.Node) -> list[Any] | None:
    """Return the arguments that an operator writes over, by its schema; None if it has none.

    A packet is all the operators of one name, of which any may be meant.
    """
    target, overloads = node.target, list[Any]()
    if isinstance(target, torch._ops.OpOverloadPacket):
        packet: Any = target
        overloads = [getattr(packet, name) for name in packet.overloads()]
    elif isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    else:
        return None
    written: list[Any] = []
    for overload in overloads:
        for at, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[at : at + 1] or (node.kwargs.get(argument.name),)
                written += given
    return written


def is_batch_norm(node: fx.Node) -> bool:
    """Return whether a node calls `torch.nn.functional.batch_norm`, or `torch.batch_norm`."""
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def example_of(node: fx.Node) -> Tensor | None:
    """Return the tensor without values that stands for what a node returns, if that is one."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None
