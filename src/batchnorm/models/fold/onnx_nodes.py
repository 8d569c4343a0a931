"""What the nodes of ONNX graphs are and read."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, NodeProto


def reads(node: NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, those in its branches included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for body in graphs_of(attribute):
            for inner in body.node:
                yield from reads(inner)
            yield from (value.name for value in body.output)


def graphs_of(attribute: AttributeProto) -> Iterator[GraphProto]:
    """Yield the graphs in an attribute."""
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node as Python has them."""
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def norm_name(node: NodeProto, taken: Container[str] = ()) -> str:
    """Return what a batch norm is called: as its statistics are, or as the file says.

    Args:
        node: It.
        taken: What others are called: then it gets a number.
    """
    mean = str(node.input[3])
    is_named = mean.endswith(".running_mean")
    name = mean.removesuffix(".running_mean") if is_named else str(node.name or node.output[0])
    if name not in taken:
        return name
    return next(new for at in count(2) if (new := f"{name}_{at}") not in taken)


def inner_nodes(node: NodeProto) -> Iterator[NodeProto]:
    """Yield the nodes in the branches of a node."""
    for attribute in node.attribute:
        for body in graphs_of(attribute):
            for inner in body.node:
                yield inner
                yield from inner_nodes(inner)
