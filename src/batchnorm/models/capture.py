"""The graphs of a model, as TorchDynamo captures them: however its forward is written.

A graph has the operations that the model calls, with `torch.nn.functional.batch_norm` among them;
where the model does what cannot be captured, there are several graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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


def capture(
    model: nn.Module, example: Sequence[Any], keywords: Mapping[str, Any] | None = None
) -> tuple[list[Captured], Any]:
    """Call a model, and return its graphs in the order in which they ran, and what it returned.

    Args:
        model: The model, which is called as it is: in its mode, and moving its statistics.
        example: The arguments of the call.
        keywords: Its keywords.
    """
    from torch._dynamo import config  # all of the compiler, when it is first needed

    token = _captured.set([])
    try:
        with config.patch(
            recompile_limit=VERSIONS,
            accumulated_recompile_limit=VERSIONS,
            skip_nnmodule_hook_guards=False,  # another model of the class may have other hooks
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


def module_of(node: fx.Node) -> str:
    """Return the name of the innermost module whose forward made a node, as the model has it.

    It is empty for the model itself.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    for prefix in ("L['self']", "L['fn']", "L['mod']"):
        path = path.removeprefix(prefix)
    return str(path).removeprefix(".").removeprefix("_orig_mod").removeprefix(".")


def is_batch_norm(node: fx.Node) -> bool:
    """Return whether a node calls `torch.nn.functional.batch_norm`, or `torch.batch_norm`."""
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def example_of(node: fx.Node) -> Tensor | None:
    """Return the tensor without values that stands for what a node returns, if that is one."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None
