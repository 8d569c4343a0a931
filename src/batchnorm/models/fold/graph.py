"""What every form of a model is read as: its batch norms, its linear maps, what is between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: The sizes of a tensor: numbers, or expressions that are equal only where that is proved.
Shape = tuple[Hashable, ...]


@dataclass(eq=False)
class Value:
    """A tensor that depends on what the model is called with.

    Attributes:
        shape: Its sizes, where they are known.
        is_floating: Whether its type is a floating-point one.
        producer: What makes it; None if it comes from outside.
        users: What reads it, the output of the model included.
    """

    shape: Shape | None = None
    is_floating: bool = True
    producer: Op | None = None
    users: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """An operation.

    Attributes:
        what: Its name, for people.
        at: Its place among all operations.
        inputs: What it reads; the first is what a layer is called with.
        output: What it makes.
        writes: Whether it writes over what it reads.
        node: What it is in the form that was read.
    """

    what: str
    at: int
    inputs: list[Value]
    output: Value
    writes: bool = False
    node: Any = None


@dataclass(eq=False)
class View(Op):
    """An operation that moves, repeats, drops or averages values of a channel, and no more.

    A scale and a shift of the channels are the same before it and after it.

    Attributes:
        dims: For each dimension of its input that it keeps whole and in order, which one of its
            output that is.
    """

    dims: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class Map(Op):
    """A convolution, a transposed convolution, or a linear layer.

    Attributes:
        weight: The name of its weight.
        bias: That of its bias, if it has one.
        in_dim: The dimension of its input's channels.
        out_dim: The dimension of its output's.
        groups: Into how many groups both are split.
        transposed: Whether the channels of the input come first in the weight.
        is_uneven: Whether a constant input has an output that is not the same everywhere.
        refuses_bias: Why it can be given no bias, if that is so.
    """

    weight: str = ""
    bias: str | None = None
    in_dim: int = 1
    out_dim: int = 1
    groups: int = 1
    transposed: bool = False
    is_uneven: bool = False
    refuses_bias: str = ""

    def is_like(self, other: Map) -> bool:
        """Return whether another one has the same weight, and uses it in the same way."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("weight", "bias", "groups", "transposed")
        )

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.weight.removesuffix(".weight")


@dataclass(eq=False)
class Norm(Op):
    """A batch norm that normalizes by running statistics, along dimension 1.

    Attributes:
        layer: Its name; those of a layer that is called several times have the same.
        names: The names of its mean, variance, weight and bias; None for what it has not.
        eps: Added to the variance.
    """

    layer: str = ""
    names: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)
    eps: float = 1e-5


@dataclass(eq=False)
class Graph:
    """All operations of a model.

    Attributes:
        ops: In the order in which they run.
        uses: What reads a tensor of the model, by its name.
        stuck: Why a batch norm cannot be taken out, by its name.
        fixed: Why a tensor must stay what it is, by its name.
        gives_biases: Whether a linear map can get a bias of its own in place of a shared one.
    """

    ops: list[Op] = field(default_factory=list)
    uses: dict[str, list[Op]] = field(default_factory=lambda: defaultdict(list))
    stuck: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    gives_biases: bool = False

    def add(self, op: Op, names: Sequence[str] = ()) -> None:
        """Add an operation that comes after those that are there.

        Args:
            op: It.
            names: The tensors of the model that it reads.
        """
        op.output.producer = op
        for value in op.inputs:
            value.users.append(op)
        for name in names:
            self.uses[name].append(op)
        self.ops.append(op)

    def has_own_bias(self, op: Map) -> bool:
        """Return whether a linear map has a bias, which only maps of the same weight read."""
        return op.bias is not None and all(
            isinstance(user, Map) and user.weight == op.weight for user in self.uses[op.bias]
        )

    @property
    def norms(self) -> dict[str, list[Norm]]:
        """The calls of each batch norm, in the order of the first."""
        found: dict[str, list[Norm]] = {}
        for op in self.ops:
            if isinstance(op, Norm):
                found.setdefault(op.layer, []).append(op)
        return found


def permuted(order: Sequence[int]) -> dict[int, int]:
    """Return where the dimensions are: that of place i of the output is order[i] of the input."""
    return {before: after for after, before in enumerate(order)}


def kept(before: Shape | None, after: Shape | None) -> dict[int, int]:
    """Return the dimensions whose size is the same, of what changes no order of dimensions."""
    if before is None or after is None or len(before) != len(after):
        return {}
    return {d: d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a == b}


def reshaped(before: Shape | None, after: Shape | None) -> dict[int, int]:
    """Return where the dimensions are that stay whole, of values that stay in their order.

    A dimension is the same one if it has the same size and as many values lie before it, or after
    it, which is then the same.
    """
    if before is None or after is None or 0 in before:
        return {}
    found: dict[int, int] = {}
    for d, size in enumerate(before):
        for e, other in enumerate(after):
            if size == other and (
                _product(before[:d]) == _product(after[:e])
                or _product(before[d + 1 :]) == _product(after[e + 1 :])
            ):
                found.setdefault(d, e)
    return found


def _product(sizes: Shape) -> tuple[int, list[str]]:
    """Return the product of numbers and of expressions: one number, and what is not known."""
    number, unknown = 1, list[str]()
    for size in sizes:
        if isinstance(size, int):
            number *= size
        elif hasattr(size, "as_coeff_mul"):  # an expression of sympy
            factor, others = size.as_coeff_mul()
            number *= int(factor)
            unknown += map(str, others)
        else:
            unknown.append(str(size))
    return number, sorted(unknown)
