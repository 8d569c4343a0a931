"""Writing the chains of a graph as one call each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from batchnorm.models.accelerate.chains import Chain, find_chains
from batchnorm.models.accelerate.fused import (
    add_once,
    checkpointed,
    fused,
    operator_noted,
)
from batchnorm.models.accelerate.operations import (
    ARGUMENTS,
    arguments_of,
    is_elementwise,
    is_operator,
    storage_of,
    written_by,
)
from batchnorm.models.accelerate.recompute import note_elementwise
from batchnorm.models.capture import example_of


def fuse(graph: fx.Graph, chains: list[Chain], *, noted: bool = False) -> None:
    """Put one call in the place of each chain of a graph.

    Args:
        graph: The graph, changed.
        chains: Its chains, in the order of their batch norms.
        noted: Whether the call notes how what it returns is made again.
    """
    stands_for: dict[fx.Node, fx.Node] = {}
    if any(getattr(node.target, "__name__", "") == "_get_data_attr" for node in graph.nodes):
        noted = False  # nobody could tell that a tensor was changed by way of `.data`
    for chain in chains:
        residual = chain.residual and stands_for.get(chain.residual, chain.residual)
        gone = chain.links
        if is_operator(chain.norm):
            node = chain.value
            _extend(chain, residual, noted)
        else:
            anchor = chain.anchor or chain.norm
            arguments = arguments_of(chain.norm)
            given = [arguments[name] for name in ARGUMENTS]
            # a chain whose end is the anchor may stand before this batch norm
            with graph.inserting_after(max(chain.norm, stands_for.get(anchor, anchor))):
                node = graph.call_function(fused, (*given, residual, chain.activation, noted))
            node.meta = dict(chain.norm.meta)
            gone = [chain.norm, *gone]
        node.meta["chain"] = chain
        for old in gone:
            stands_for[old] = node
            old.replace_all_uses_with(node, delete_user_cb=partial(_is_apart, frozenset(gone)))
        for old in reversed(gone):
            graph.erase_node(old)
    graph.lint()


def _is_apart(gone: frozenset[fx.Node], user: fx.Node) -> bool:
    return user not in gone


def _extend(chain: Chain, residual: fx.Node | None, noted: bool) -> None:
    """Let an operator of ours do what its chain does."""
    arguments = list(chain.norm.args)
    if residual is not None:
        arguments[3] = residual
    if chain.activation is not None:
        arguments[10:12] = chain.activation
    chain.norm.args = tuple(arguments)
    if noted:
        chain.norm.target = operator_noted


def note(graph: fx.Graph) -> None:
    """Let what can be made again be made again in the backward pass, where the graph runs as it is.

    Args:
        graph: A graph after `fuse`, changed.
    """
    for node in made_again(graph):
        if "chain" in node.meta:  # whose call has noted it
            continue
        with graph.inserting_before(node):
            new = graph.call_function(_noted(node), tuple(node.all_input_nodes))
        new.meta = node.meta
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def tag(graph: fx.Graph) -> None:
    """Let a compiler that divides a graph into forward and backward pass do the same.

    Args:
        graph: A graph after `fuse`, changed.
    """
    for node in made_again(graph):
        chain = node.meta.get("chain")
        if chain is not None and is_operator(chain.norm):
            node = chain.norm
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta["ac_graph_id"] = 0


def made_again(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that are elementwise on the output of a fused call, and those calls."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if "chain" in node.meta or (
            is_elementwise(node) and not found.keys().isdisjoint(node.args)
        ):
            found[node] = None
    return list(found)


def _noted(node: fx.Node) -> Callable[..., Tensor]:
    """Return what takes the tensors of an elementwise node, does what it did, and notes how."""
    target, arguments, keywords = node.target, node.args, node.kwargs
    nodes = node.all_input_nodes

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(nodes, tensors, strict=True))
        first, *others = fx.map_arg(arguments, given.__getitem__)
        if isinstance(target, str):
            result: Tensor = getattr(first, target)(*others, **keywords)
        else:
            assert callable(target)
            result = target(first, *others, **keywords)
        return result

    def noted(*tensors: Tensor) -> Tensor:
        return note_elementwise(function, *tensors)

    return noted


def checkpoint_parts(module: fx.GraphModule) -> None:
    """Let what is under `torch.utils.checkpoint` be so where the graph runs as it is.

    A compiler does it by itself, and leaves marks in the graph alone. Batches are counted once,
    also where the checkpoint is around the graph.

    Args:
        module: The graph, changed, with the graphs in it.
    """
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target == "add_" and _is_count(node.args[0]):
            node.op, node.target = "call_function", add_once
        body = _body_of(node, module)
        if body is None:
            continue
        body.meta["batchnorm_moved"] = _moved_by(body)
        fuse(body.graph, find_chains(body.graph))
        checkpoint_parts(body)
        body.recompile()
        node.target = checkpointed


def _body_of(node: fx.Node, module: fx.GraphModule) -> fx.GraphModule | None:
    """Return what a node of a module does under a checkpoint, if it is one."""
    if getattr(node.target, "__name__", "") != "tag_activation_checkpoint":
        return None
    name: Any = node.args[0]
    body: Any = module.get_submodule(name.target)
    return body if isinstance(body, fx.GraphModule) else None


def _is_count(node: fx.Node) -> bool:
    return node.op == "placeholder" and "num_batches_tracked" in str(node.target)


def _moved_by(module: fx.GraphModule) -> set[int]:
    """Return which of its inputs a graph moves, by their numbers: statistics and counts."""
    written = set[int | None]()
    for node in module.graph.nodes:
        written |= written_by(node)
        body = _body_of(node, module)
        if body is not None:
            written |= {storage_of(node.args[1 + at]) for at in _moved_by(body)}
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    examples = [(storage_of(node), example_of(node)) for node in inputs]
    return {
        at
        for at, (memory, value) in enumerate(examples)
        if memory in written - {None} and value is not None and value.ndim < 2
    }
