"""Activations that can write over what they read, for nothing else in the graph sees that.

What a batch norm returned was memory of its own, and its activation filled more. Without it the
activation can write into what the convolution returned, or into the sum with a residual.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sized

from torch import nn

from batchnorm.models.capture import module_of
from batchnorm.models.fold.graph import Graph, Map, Norm, Op, Value
from batchnorm.models.fold.plan import Plan

#: Those that have `inplace`.
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)


def overwriting(
    graph: Graph, plan: Plan, modules: Mapping[str, nn.Module], calls: Mapping[str, Sized]
) -> list[str]:
    """Return the names of the activations that can write over what they read, each time.

    Args:
        graph: The operations of the model.
        plan: What is folded.
        modules: Its modules, by name.
        calls: The calls that each activation had, those that are not in the graph included.
    """
    found: dict[str, list[Op]] = defaultdict(list)
    for op in graph.ops:
        name = module_of(op.node)
        if type(modules.get(name)) in ACTIVATIONS:
            found[name].append(op)
    return [
        name
        for name, ops in found.items()
        if len(ops) == len(calls.get(name, ()))
        and all(
            not op.writes and len(op.inputs) == 1 and _is_free(op.inputs[0], op, plan) for op in ops
        )
    ]


def _is_free(value: Value, op: Op, plan: Plan) -> bool:
    """Return whether a value is of what was folded, in memory of its own, and one op reads it."""
    maker = value.producer
    if maker is None or value.users != [op]:
        return False
    if isinstance(maker, Norm):
        return _is_taken_in(maker, plan)
    if len(maker.inputs) != 2:  # or else parameters are added
        return False
    if maker.what == "add" and not maker.writes:
        return any(
            isinstance(v.producer, Norm) and v.producer.layer in plan.folded for v in maker.inputs
        )
    return maker.what in ("iadd", "add_") and _is_free(maker.inputs[0], maker, plan)


def _is_taken_in(norm: Norm, plan: Plan) -> bool:
    """Return whether what a batch norm normalizes is then what it returned."""
    source = norm.inputs[0].producer
    return isinstance(source, Map) and any(
        source.is_like(into) for into in plan.folded.get(norm.layer, ())
    )
