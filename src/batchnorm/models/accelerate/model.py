"""Accelerating a model, and saying how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.layers import BatchNorm
from batchnorm.models.accelerate.chains import Chain, find_chains
from batchnorm.models.accelerate.operations import arguments_of, parts_of
from batchnorm.models.batches import Buffers, rng_states, set_rng_states
from batchnorm.models.capture import (
    ISOLATED,
    Captured,
    capture,
    check_captured,
    module_of,
    unwrapped,
)
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms


def accelerate(
    model: nn.Module,
    inner: str | Callable[..., Any] | None = None,
    save_memory: bool = False,
    *,
    dynamic: bool | None = None,
) -> nn.Module:
    """Return a model that runs its batch norms fused with what follows them.

        y = activation(batch_norm(x) + residual)        in one call, forward and backward

    However the forward is written: by modules or functions, with `+=`, with activations in place.
    The batch norms are those of `torch.nn`, `torch.nn.functional.batch_norm`, or ours. What is
    fused gives the result of the model as it is, to rounding; what something else sees, a hook,
    say, or the output of the model, is not fused. `explain` says what is, and why not more. Where
    there are kernels, a batch that is not finite moves no running statistics.

    It is `torch.compile(model, backend="batchnorm", options={"inner": ..., "save_memory": ...})`:
    the model's graph is captured at the first call, again for another mode or type, and where it
    breaks there are several. All but the batch norms runs as it was written. Hooks are those that
    the model has when it is first called.

    With `save_memory=True` the output of a batch norm with its activation is not kept for the
    backward pass, where the next layer would keep it: it is made again, elementwise, from what the
    batch norm keeps anyway. The gradients are the same, bit for bit. It goes together with
    `torch.utils.checkpoint`, inside of which nothing is kept at all. With another backend inside,
    that makes the outputs again, moments and all.

    Args:
        model: The model, which shares its parameters with what is returned.
        inner: Another backend of `torch.compile`, as `"inductor"`, for all but the batch norms.
        save_memory: Whether outputs are made again in the backward pass.
        dynamic: Whether sizes may change from call to call without a new capture; if left out,
            those that did change once.

    Returns:
        The module to call.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fast = bn.accelerate(model, save_memory=True)
        >>> x = torch.randn(4, 3, 8, 8)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    from batchnorm.models.accelerate.backend import backend  # all of the compiler

    model = unwrapped(model)
    if isinstance(inner, str):
        torch._dynamo.lookup_backend(inner)  # or else the first call would be refused
    options = {"inner": inner, "save_memory": save_memory}
    options = {name: value for name, value in options.items() if value}
    compiled: Any = torch.compile(
        model,
        backend=backend,
        options=options,  # type: ignore[arg-type]
        dynamic=dynamic,
        **ISOLATED,
    )
    assert isinstance(compiled, nn.Module)
    return compiled


@dataclass(repr=False)
class FusionReport(Report):
    """Which batch norms run with what follows them, and why the others do not.

    Attributes:
        fused: For each call of a layer that runs with more in one call, with what: `"relu"`,
            `"add"` or `"add + relu"`. A second call of a layer has its number.
        graphs: The number of graphs that the model was captured in.
    """

    fused: dict[str, str] = field(default_factory=dict)
    graphs: int = 0

    verb: str = "fused"

    def _details(self) -> list[str]:
        kinds = Counter(self.fused.values()).most_common()
        return [f"  with {kind}: {number}" for kind, number in kinds]


def explain(
    model: nn.Module,
    example: Sequence[Any] | Tensor,
    *,
    keywords: Mapping[str, Any] | None = None,
    where: Where = None,
) -> FusionReport:
    """Say what `accelerate` fuses in a model, and why not more.

    The model is called once, as it is; its buffers and the state of random numbers are restored.

    Args:
        model: The model, accelerated or not, in the mode that is asked about.
        example: The arguments of a call; a tensor is the only one.
        keywords: Its keywords.
        where: Of which layers; see `freeze`.

    Returns:
        What runs fused, in `fused`; in `left` each batch norm that runs alone, with the reason why
        what follows does not run with it, or that is not called at all.

    Raises:
        TypeError: `model` is no module, or `example` neither a tensor nor a sequence.
        ValueError: `where` names no layer, or the model has no values.
        RuntimeError: TorchDynamo captures nothing of the model.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5))
        >>> bn.explain(model, (torch.randn(8, 3),))
        1 fused: 1
          with relu: 1
          left 3: it is returned
    """
    model = unwrapped(model)
    report, calls = FusionReport(), Counter[str]()
    layers = batch_norms(model, where, alike=True)
    buffers, random = Buffers(model), rng_states()
    try:
        captured, _ = capture(model, example, keywords)
    finally:
        buffers.restore()
        set_rng_states(random)
    check_captured(captured, model)
    report.graphs = len(captured)
    for graph in captured:
        for chain in (c for part in parts_of(graph.module) for c in find_chains(part.graph)):
            layer = _layer_of(chain, graph)
            if where is not None and layer not in layers:
                continue
            calls[layer] += 1
            name = layer if calls[layer] == 1 else f"{layer} (call {calls[layer]})"
            parts = ["add"] if chain.residual is not None else []
            if chain.activation is not None:
                parts.append(chain.activation[0])
            if parts:
                report.done.append(name)
                report.fused[name] = " + ".join(parts)
            else:
                report.left[name] = chain.ended
    for name, module in layers.items():
        if name not in calls:
            report.left[name] = _uncalled(module)
    return report


def _layer_of(chain: Chain, captured: Captured) -> str:
    """Return the name of the layer that made a chain."""
    arguments = arguments_of(chain.norm)
    for suffix in ("running_mean", "weight"):
        node = arguments[suffix]
        name = None if node is None else captured.names.get(node)
        if name is not None:
            return name.removesuffix(suffix).removesuffix(".")
    return module_of(chain.norm)


def _uncalled(layer: nn.Module) -> str:
    if isinstance(layer, BatchNorm):
        return "it runs by operators of its own, or the example does not reach it"
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return (
            f"it is a {type(layer).__name__}, which does not call batch_norm: bn.convert(model) "
            "first"
        )
    return "the example does not reach it, or TorchDynamo captures no graph with it"
