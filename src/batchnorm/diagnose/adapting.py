"""Adaptation at test time: each batch by a blend of the running moments and its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.diagnose.adapt import ONE_BATCH, blend
from batchnorm.diagnose.observe import Seen, observed
from batchnorm.models.batches import uncompiled
from batchnorm.models.walk import Where, batch_norms
from batchnorm.moments import Moments


@contextmanager
def adapting(model: nn.Module, *, prior: float = ONE_BATCH, where: Where = None) -> Iterator[None]:
    """Normalize each batch, in evaluation, by a blend of the running moments and its own, inside.

        mean = (1 - w) running_mean + w mean_batch        w = n / (prior + n)

    and the variance likewise, for a batch of n examples: adaptation at test time, for one batch at
    a time and then forgotten. Nothing is kept: no statistic changes. Predictions then depend on
    the rest of the batch. Layers in training are left alone. What `torch.compile` made runs as it
    was written; one thread at a time.

    Args:
        model: The model, used inside as always.
        prior: How many examples the running moments count for. 16 is about right for pictures
            (Schneider et al., figure 2); 0 takes the batch's alone, which needs many examples.
        where: Which layers; see `freeze`.

    Raises:
        ValueError: `prior` is negative, or `where` names no layer.

    Example:
        >>> import batchnorm as bn, torch
        >>> model = bn.BatchNorm(3).eval()
        >>> x = torch.randn(100, 3) + 5
        >>> with bn.adapting(model):
        ...     y = model(x)
        >>> bool(y.mean() < model(x).mean())
        True

    Source:
        Schneider et al., 2020 (arXiv:2006.16971).
    """
    if not prior >= 0:
        raise ValueError(f"prior is {prior}: expected 0 or more")
    layers = {
        name: layer
        for name, layer in batch_norms(model, where).items()
        if layer.running_mean is not None and layer.running_var is not None
    }
    sources = {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}

    def before(name: str, seen: Seen) -> None:
        layer, (mean, var) = layers[name], sources[name]
        if layer.training or mean is None or var is None:
            return
        x, places = seen.rows()
        own = Moments.of(x, weights=places)
        examples = len(x) if places is None else int((places.sum((1, 2)) > 0).sum())
        if examples == 0 or not bool(own.mean.isfinite().all() and own.m2.isfinite().all()):
            return
        weight = examples / (prior + examples)
        if not float(own.count) > 1:  # one value has a mean, and no variance
            weight = 0.0
        layer._buffers["running_mean"] = blend(mean, own.mean, weight).to(mean.dtype)
        layer._buffers["running_var"] = blend(var, own.var(), weight).to(var.dtype)

    def restore(name: str) -> None:
        layers[name]._buffers["running_mean"], layers[name]._buffers["running_var"] = sources[name]

    handles = [
        layer.register_forward_hook(lambda *_, name=name: restore(name), always_call=True)
        for name, layer in layers.items()
    ]
    try:
        with uncompiled(), observed(layers, before):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name in layers:
            restore(name)
