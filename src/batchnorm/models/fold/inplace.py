"""Activations that can write over what they read, for nothing else sees what was folded.

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
_SUMS = ("add", "iadd", "add_")


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
        and all(not op.writes and _is_seen_by(op, op.inputs[0], plan) for op in ops)
    ]


def _is_seen_by(op: Op, value: Value, plan: Plan) -> bool:
    """Return whether a value has memory of its own, once folded, which nothing but an op reads."""
    maker = value.producer
    if value.users != [op] or maker is None:
        return False
    if isinstance(maker, Norm):
        source = maker.inputs[0]
        return any(
            isinstance(source.producer, Map) and source.producer.is_like(into)
            for into in plan.folded.get(maker.layer, ())
        )
    if maker.what not in _SUMS:
        return False
    return not maker.writes or _is_seen_by(maker, maker.inputs[0], plan)
