"""Finding BN -> (+ residual) -> (activation) in a captured graph, where it may run as one call.

A chain may run as one call if nothing else sees what is between its links, and if nothing that the
call reads has changed by the time that it runs: see `_Finder`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from batchnorm.models.accelerate.operations import (
    activation_of,
    addend_of,
    arguments_of,
    is_barrier,
    is_identity,
    is_operator,
    operands_of,
    storage_of,
    value_of,
    written_by,
)


@dataclass
class Chain:
    """A batch norm, and what runs with it in one call.

    Attributes:
        norm: The node that calls it.
        value: What it returns, which is that node, or the first of several results.
        links: The nodes after it that run with it, the last of which is what the call returns.
        residual: What is added, or None.
        activation: The name of the activation, and its parameter, or None.
        anchor: The node after which the call stands; None where the batch norm stood.
        ended: Why no more runs with it.
    """

    norm: fx.Node
    value: fx.Node
    links: list[fx.Node] = field(default_factory=list)
    residual: fx.Node | None = None
    activation: tuple[str, float | None] | None = None
    anchor: fx.Node | None = None
    ended: str = ""

    @property
    def last(self) -> fx.Node:
        """The node in whose place the call stands."""
        return self.links[-1] if self.links else self.value


def find_chains(graph: fx.Graph) -> list[Chain]:
    """Return a chain for every batch norm of a graph, in their order."""
    finder = _Finder(graph)
    found = ((node, value_of(node)) for node in finder.nodes)
    return [finder.chain(node, value) for node, value in found if value is not None]


class _Finder:
    """Finds the chains of one graph.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: at for at, node in enumerate(self.nodes)}
        self.writes: dict[int, list[fx.Node]] = defaultdict(list)  # by memory
        self.barriers = [node for node in self.nodes if is_barrier(node)]
        for node in self.nodes:
            for memory in written_by(node):
                self.writes[memory].append(node)
        self.taken: set[fx.Node] = set()

    def chain(self, norm: fx.Node, value: fx.Node) -> Chain:
        """Return the chain that begins with a batch norm."""
        chain = Chain(norm, value)
        if storage_of(value) is None:
            chain.ended = "what it returns is not known"
            return chain
        while not chain.ended:
            found = self._follower(chain)
            if isinstance(found, str):
                chain.ended = found
            else:
                chain.ended = self._link(chain, found)
        self.taken.update(chain.links)
        return chain

    def _follower(self, chain: Chain) -> fx.Node | str:
        """Return the one node that sees what a chain returns, or why there is none.

        What a node changes in place is seen by the others after it as it is then: they count as
        seeing what the chain returns in the end, if they come after the last link.
        """
        last = chain.last
        memory = storage_of(last)
        same = [n for n in (chain.value, *chain.links) if storage_of(n) == memory]
        users = {user for node in same for user in node.users} - set(chain.links)
        if not users:
            return "nothing uses it"
        first = min(users, key=self.position.__getitem__)
        others = [user for user in users if user is not first]
        if first.op == "output":
            return "it is returned"
        if first not in last.users:
            return "it is seen where it was before it changed in place"
        if others and memory not in written_by(first):
            return f"it is used {len(users)} times"
        return first

    def _link(self, chain: Chain, node: fx.Node) -> str:
        """Add a node to a chain, or return why it cannot be."""
        value, end = chain.last, f"{_name(node)} follows"
        residual, has_activation = operands_of(chain.norm)
        if chain.activation is not None or has_activation:
            return end
        if node in self.taken:
            return "it is the residual of another one"
        if any(
            self.position[value] < self.position[b] < self.position[node] for b in self.barriers
        ):
            return "a mode changes before what follows"
        if is_identity(node) and node.args[0] is value:
            chain.links.append(node)
            return ""
        activation = activation_of(node, value)
        if activation is not None:
            if (barred := self._keeps_residual(chain, node)) is not None:
                return barred
            chain.activation = activation
            chain.links.append(node)
            return ""
        if chain.residual is not None or residual is not None:
            return end
        added = addend_of(node, value)
        if added is None or isinstance(added, str):
            return added or end
        anchor = self._anchor(chain.norm, added, node)
        if isinstance(anchor, str):
            return anchor
        chain.residual, chain.anchor = added, anchor
        chain.links.append(node)
        return ""

    def _anchor(self, norm: fx.Node, residual: fx.Node, add: fx.Node) -> fx.Node | str | None:
        """Return after which node both x and the residual are what they have to be.

        Returns None where that is so at once, and a reason where it never is.
        """
        memory, start, end = storage_of(residual), self.position[norm], self.position[add]
        if memory is None:
            return "the memory of what is added is not known"
        changes = [node for node in self.writes[memory] if self.position[node] < end]
        ready = max([residual, *changes], key=self.position.__getitem__)
        if self.position[ready] < start:
            return None
        if is_operator(norm):  # what else it returns is read at once
            return "what is added comes after it"
        stop = self.position[ready]
        arguments = arguments_of(norm)
        read = {storage_of(v) for v in arguments.values()} - {None}
        for node in self.nodes[start + 1 : stop + 1]:
            if node in self.barriers:
                return "a mode changes before what is added is there"
            if written_by(node) & read:
                return "what it reads changes before what is added is there"
            if arguments["training"] and self._reads_running(node, arguments):
                return "its running statistics are read before what is added is there"
        return ready

    def _reads_running(self, node: fx.Node, arguments: dict[str, Any]) -> bool:
        running = {storage_of(arguments["running_mean"]), storage_of(arguments["running_var"])}
        return any(storage_of(v) in running - {None} for v in node.all_input_nodes)

    def _keeps_residual(self, chain: Chain, node: fx.Node) -> str | None:
        """Return why the backward pass through an activation could not keep the residual.

        With an activation, it is kept, which a sum alone does not do.
        """
        if chain.residual is None:
            return None
        memory, after = storage_of(chain.residual), self.position[chain.links[-1]]
        assert memory is not None  # or it would be no residual
        if any(self.position[write] > after for write in self.writes[memory]):
            return "what is added changes later"
        return None


def _name(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.rsplit(".", 1)[-1]
