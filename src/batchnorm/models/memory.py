"""What a model keeps for its backward pass, by layers, and what would save some of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from batchnorm.models.batches import Buffers, rng_states, set_rng_states
from batchnorm.models.capture import (
    Captured,
    capture,
    check_captured,
    module_of,
    unwrapped,
)

#: The ways to run a model of which it is said what they keep.
WAYS = ("stock", "accelerated", "save_memory")
_SHOWN = 16


def kept_bytes(outputs: Any, *, exclude: Iterable[Tensor] = ()) -> int:
    """Return how much autograd keeps in memory until the backward pass of these outputs.

    Memory counts once, however often it is kept. What `torch.utils.checkpoint` holds outside of
    the graph is not seen.

    Args:
        outputs: What a model returned, in any nesting: tensors, or a loss.
        exclude: What there would be anyway: parameters, buffers and inputs.

    Returns:
        The number of bytes.

    Example:
        >>> import torch
        >>> from batchnorm.models.memory import kept_bytes
        >>> x = torch.ones(10, requires_grad=True)
        >>> kept_bytes(x.exp())  # keeps its output: 10 values of 4 bytes
        40
    """
    from batchnorm.models.accelerate.recompute import held_by

    known = _memory(exclude)
    sizes: dict[int, int] = {}
    nodes = [t.grad_fn for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if not name.startswith("_raw_saved_"):
                continue
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple | list) else (saved,):
                for tensor in held_by(one.data):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in known:
                        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1))


@dataclass(repr=False)
class MemoryReport:
    """What is kept for the backward pass of one call of a model.

    Attributes:
        layers: For each layer that keeps anything, by its name, the bytes that it keeps as the
            model is (`"stock"`), by `accelerate(model)` (`"accelerated"`), and by
            `accelerate(model, save_memory=True)` (`"save_memory"`). What several layers keep, the
            output of one and input of the next, counts for the first that keeps it. The name of
            the model itself is empty.
        total: The same for the whole model.
    """

    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {"layers": self.layers, "total": self.total}

    def __repr__(self) -> str:
        rows = sorted(self.layers.items(), key=lambda row: -row[1]["stock"])
        shown, rest = rows[:_SHOWN], rows[_SHOWN:]
        if len(rest) == 1:
            shown, rest = rows, []
        lines = [f"{'kept for the backward pass':<44}" + _header()]
        lines += [_line(name or "itself", kept) for name, kept in shown]
        if rest:
            others = Counter[str]()
            for _, kept in rest:
                others.update(kept)
            lines.append(_line(f"{len(rest)} more layers", others))
        lines.append(_line("total", self.total))
        stock = self.total["stock"]
        shares = "".join(f"{self.total[way] / stock if stock else 1:>12.0%}" for way in WAYS)
        return "\n".join([*lines, f"{'':<44}{shares}"])


def memory_report(
    model: nn.Module,
    example: Sequence[Any] | Tensor,
    *,
    keywords: Mapping[str, Any] | None = None,
) -> MemoryReport:
    """Say what each layer of a model keeps for the backward pass, and what `accelerate` saves.

    The model is called as it is, in its mode, with gradients; its buffers and the state of random
    numbers are restored. Parameters, buffers and inputs, which are there anyway, do not count.

    Args:
        model: The model, accelerated or not.
        example: The arguments of a call; a tensor is the only one.
        keywords: Its keywords.

    Returns:
        The bytes by layers. Activations grow with the batch, so that those of another batch size
        are in proportion.

    Raises:
        TypeError: `model` is no module, or `example` neither a tensor nor a sequence.
        ValueError: The model has no values.
        RuntimeError: TorchDynamo captures nothing of the model.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3)
        ... )
        >>> report = bn.memory_report(model, (torch.randn(8, 3, 32, 32),))
        >>> report.total["save_memory"] < 0.6 * report.total["stock"]
        True
    """
    model = unwrapped(model)
    report = MemoryReport(total=dict.fromkeys(WAYS, 0))
    buffers, random = Buffers(model), rng_states()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            captured, outputs = capture(model, example, keywords)
            leaves = pytree.tree_leaves((example, keywords))
            inputs = [v for v in leaves if isinstance(v, Tensor)]
            known = _memory([*model.parameters(), *model.buffers(), *inputs])
            del outputs
            check_captured(captured, model)
            for way in WAYS:
                for graph in captured:
                    for name, size in _kept_by(graph, way, known).items():
                        row = report.layers.setdefault(name, dict.fromkeys(WAYS, 0))
                        row[way] += size
                        report.total[way] += size
    finally:
        buffers.restore()
        set_rng_states(random)
    return report


def _kept_by(captured: Captured, way: str, known: set[int]) -> Counter[str]:
    """Return how much is kept by each layer in a graph that runs in one of the ways."""
    from batchnorm.models.accelerate.backend import rewrite
    from batchnorm.models.accelerate.recompute import Recipes, held_by, saving_memory
    from batchnorm.models.accelerate.rewrite import checkpoint_parts

    graph = fx.Graph()
    result = graph.graph_copy(captured.graph, {})
    graph.output(result)
    module = fx.GraphModule(captured.module, graph)
    for name, part in list(module.named_children()):  # the bodies of checkpoints are changed, too
        setattr(module, name, copy.deepcopy(part))
    if way == "stock":
        checkpoint_parts(module)
    else:
        rewrite(module, save_memory=way == "save_memory")
    walk, seen, sizes = _Walk(module), set(known), Counter[str]()

    def pack(recipes: Recipes, tensor: Tensor) -> Any:
        kept = recipes.pack(tensor)
        for held in held_by(kept):
            storage = held.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                sizes[walk.layer] += storage.nbytes()
        return kept

    with saving_memory(pack):
        kept = walk.run(*captured.inputs)
    del kept  # it holds the graph, so that no memory that was counted was another's again
    return sizes


class _Walk(fx.Interpreter):
    """Runs a graph, and says of which layer it is.

    Args:
        module: The graph.

    Attributes:
        layer: The name of the layer whose operation runs.
    """

    layer = ""

    def run_node(self, node: fx.Node) -> Any:
        """Run one operation."""
        self.layer = module_of(node)
        return super().run_node(node)


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided}


def _header() -> str:
    return "".join(f"{way:>12}" for way in WAYS)


def _line(name: str, kept: Mapping[str, int]) -> str:
    name = name if len(name) <= 43 else f"...{name[-40:]}"
    return f"{name:<44}" + "".join(f"{_size(kept[way]):>12}" for way in WAYS)


def _size(count: int) -> str:
    """Return a number of bytes as people read it: 12.3 MB."""
    if count == 0:
        return "0"
    unit, factor = next(u for u in _UNITS if count >= u[1])
    return f"{count / factor:.4g} {unit}"
