"""The backend of `torch.compile`: batch norms run fused, and all else as it is, or compiled.

The installed package says to torch, by an entry point, that this is `backend="batchnorm"`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from batchnorm.functional import traced
from batchnorm.models.accelerate.chains import find_chains
from batchnorm.models.accelerate.recompute import saving_memory
from batchnorm.models.accelerate.rewrite import checkpoint_parts, fuse, note, tag

_OPTIONS = {"inner", "save_memory"}
_log = logging.getLogger("batchnorm")


def backend(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return what runs a graph that TorchDynamo captured: see `accelerate`.

    Args:
        module: The graph, changed.
        inputs: What it is to be called with.
        mode: What `torch.compile` was given as its mode, for the inner backend.
        options: `inner` and `save_memory`, as of `accelerate`.

    Raises:
        ValueError: There is no such option.
    """
    options = options or {}
    if unknown := options.keys() - _OPTIONS:
        raise ValueError(
            f"the backend 'batchnorm' has no option {', '.join(map(repr, sorted(unknown)))}: "
            "expected inner or save_memory"
        )
    inner = options.get("inner")
    save_memory = bool(options.get("save_memory")) and not _forbids_hooks(module)
    rewrite(module, save_memory=save_memory, as_it_is=inner is None)
    if inner is not None:
        return _compiled(module, inputs, inner, mode)
    if not save_memory:
        return module.forward

    def run(*inputs: Any) -> Any:
        with saving_memory():
            return module.forward(*inputs)

    return run


def _forbids_hooks(module: fx.GraphModule) -> bool:
    """Return whether a graph has a transform of `torch.func`, in which nothing can be kept so."""
    names = (getattr(node.target, "__name__", "") for node in module.graph.nodes)
    return "_saved_tensors_hooks_disable" in names


def rewrite(module: fx.GraphModule, *, save_memory: bool, as_it_is: bool = True) -> None:
    """Let the batch norms of a graph run fused.

    Args:
        module: The graph, changed.
        save_memory: Whether what they return is made again in the backward pass.
        as_it_is: Whether it then runs as it is, and no compiler sees to its checkpoints.
    """
    chains = find_chains(module.graph)
    fuse(module.graph, chains, noted=save_memory and as_it_is)
    if as_it_is:
        checkpoint_parts(module)
    if save_memory:
        (note if as_it_is else tag)(module.graph)
    module.recompile()
    _log.info(
        "%d batch norms run fused, %d of them with an activation, %d with a residual",
        len(chains),
        sum(chain.activation is not None for chain in chains),
        sum(chain.residual is not None for chain in chains),
    )


def _compiled(
    module: fx.GraphModule, inputs: Sequence[Tensor], inner: Any, mode: str | None
) -> Callable[..., Any]:
    """Return what another backend makes of a graph whose batch norms run fused."""
    from torch._dynamo.backends.registry import lookup_backend

    with traced():
        compiled: Callable[..., Any] = lookup_backend(inner)(
            module, list(inputs), **({} if mode is None else {"mode": mode})
        )
    return compiled
