"""Which batch norms can be folded into what, by the graph; and the numbers that come of it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from batchnorm.models.fold.arithmetic import Folding, scale_and_shift
from batchnorm.models.fold.graph import Graph, Map, Norm, Op, Value, View


@dataclass
class Plan:
    """What is to be folded.

    Attributes:
        folded: The linear maps that take in each batch norm, by its name.
        left: Why each other one stays.
        foldings: The numbers that each linear map will have, by the name of its weight.
    """

    folded: dict[str, list[Map]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    foldings: dict[str, Folding] = field(default_factory=dict)

    def into(self, name: str) -> list[str]:
        """Return the names of what takes in a batch norm."""
        return [op.name for op in self.folded[name]]


class _Left(Exception):
    """A batch norm cannot be folded, for the reason given."""


def plan(graph: Graph, tensors: Mapping[str, Tensor], chosen: Container[str]) -> Plan:
    """Return which batch norms can be folded.

    First those that stand after a linear map, in the order of the calls; then, of those that are
    left, those that stand before one, the other way round. So one that is folded is seen through.

    Args:
        graph: The operations of the model.
        tensors: Its tensors.
        chosen: The names of the layers that may be folded.
    """
    return _Planner(graph, tensors).plan(chosen)


class _Planner:
    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        self.graph, self.tensors = graph, tensors
        self.result, self.gone = Plan(), set[Op]()

    def plan(self, chosen: Container[str]) -> Plan:
        result = self.result
        calls = {name: found for name, found in self.graph.norms.items() if name in chosen}
        for name, found in calls.items():
            if reason := self._stuck(name, found):
                result.left[name] = reason
        waiting = [name for name in calls if name not in result.left]
        reasons: dict[str, list[str]] = {name: [] for name in waiting}
        for is_before, order in ((False, waiting), (True, waiting[::-1])):
            for name in order:
                if name not in result.folded:
                    try:
                        self._fold(name, calls[name], is_before)
                    except _Left as reason:
                        reasons[name].append(str(reason))
        for name in waiting:
            if name not in result.folded:
                result.left[name] = "; ".join(reasons[name])
        return result

    def _stuck(self, name: str, calls: list[Norm]) -> str:
        """Return why a layer cannot be taken out, wherever it stands; nothing if it can."""
        if name in self.graph.stuck:
            return self.graph.stuck[name]
        if any((call.names, call.eps) != (calls[0].names, calls[0].eps) for call in calls):
            return "it is not called with the same tensors each time"
        for tensor in calls[0].names:
            for op in () if tensor is None else self.graph.uses[tensor]:
                if op.writes:
                    return f"{op.what} may write over {tensor!r}"
        return ""

    def _fold(self, name: str, calls: list[Norm], is_before: bool) -> None:
        find = self._targets if is_before else self._sources
        maps = {op: None for call in calls for op in find(call)}
        scale, shift = scale_and_shift(calls[0], self.tensors)
        foldings: dict[str, Folding] = {}
        for op in maps:
            self._check_uses(op, maps)
            if is_before and op.is_uneven and bool((shift != 0).any()):
                raise _Left(
                    f"its shift would not be the same everywhere behind {op.name!r}, which "
                    + ("is transposed" if op.transposed else "pads with zeros")
                )
            if op.weight in foldings:
                continue
            known = self.result.foldings.get(op.weight)
            folding = Folding(op, self.tensors) if known is None else known.copy()
            folding.fold(scale, shift, is_before)
            if folding.bias is not None and op.bias is None and op.refuses_bias:
                raise _Left(f"{op.name!r} would need a bias, but {op.refuses_bias}")
            if not folding.is_finite():
                raise _Left(f"{op.name!r} would have numbers too large for {folding.dtype}")
            foldings[op.weight] = folding
        self.result.foldings |= foldings
        self.result.folded[name] = [folding.op for folding in foldings.values()]
        self.gone.update(calls)

    def _check_uses(self, op: Map, maps: Container[Op]) -> None:
        """Raise _Left unless all that reads the weight and the bias is among the maps."""
        tensors = [op.weight]
        if op.bias is not None and not self.graph.gives_biases:
            tensors.append(op.bias)
        for tensor in tensors:
            if tensor in self.graph.fixed:
                raise _Left(f"{tensor!r} {self.graph.fixed[tensor]}")
            for other in self.graph.uses[tensor]:
                if isinstance(other, Map) and other not in maps:
                    how = "is called elsewhere, too, without it"
                    raise _Left(f"{other.name!r} {how if tensor == op.weight else 'shares a bias'}")
                if other not in maps:
                    raise _Left(f"{other.what} reads {tensor!r}, too")
                if isinstance(other, Map) and not other.is_like(op):
                    raise _Left(f"{op.name!r} is called with one bias and with another")

    def _sources(self, norm: Norm) -> list[Map]:
        """Return the linear map whose output a batch norm normalizes, and nothing else reads."""
        value, dim = norm.inputs[0], 1
        while True:
            op = value.producer
            if op is None:
                raise _Left("it normalizes what comes from outside of the graph")
            if len(value.users) > 1:
                readers = [_name(user) for user in value.users if user is not norm]
                read = "reads" if len(readers) == 1 else "read"
                raise _Left(f"{', '.join(readers)} {read} what it normalizes, too")
            if isinstance(op, Map):
                if op.out_dim != dim:
                    raise _Left(f"its channels are not those of {op.name!r}")
                return [op]
            if op not in self.gone:
                if not isinstance(op, View) or not op.inputs[0].is_floating:
                    raise _Left(f"it normalizes what {_name(op)} returns")
                dim = _followed({after: before for before, after in op.dims.items()}, dim, op)
            value = op.inputs[0]

    def _targets(self, norm: Norm) -> list[Map]:
        """Return the linear maps that read what a batch norm returns, and nothing else does."""
        found: list[Map] = []
        waiting: list[tuple[Value, int]] = [(norm.output, 1)]
        while waiting:
            value, dim = waiting.pop()
            for op in value.users:
                if isinstance(op, Map):
                    if op.in_dim != dim:
                        raise _Left(f"its channels are not those of {op.name!r}")
                    found.append(op)
                elif op in self.gone:
                    waiting.append((op.output, dim))
                elif isinstance(op, View) and op.output.is_floating and op.inputs[0] is value:
                    waiting.append((op.output, _followed(op.dims, dim, op)))
                else:
                    raise _Left(f"{_name(op)} reads what it returns")
        if not found:
            raise _Left("nothing reads what it returns")
        # what it normalizes is then read later than now
        for op in self.graph.ops[norm.at : max(op.at for op in found)]:
            if op.writes:
                raise _Left(f"{op.what} may write over what it normalizes")
        return found


def _followed(dims: Mapping[int, int], dim: int, op: Op) -> int:
    if dim not in dims:
        raise _Left(f"{op.what} does not keep its channels as one dimension")
    return dims[dim]


def _name(op: Op) -> str:
    if isinstance(op, Map):
        return repr(op.name)
    return repr(op.layer) if isinstance(op, Norm) else op.what
