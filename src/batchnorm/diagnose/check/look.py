"""The one pass over the data: each batch in evaluation, and by its own moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.accuracy import examples_in, labels_in
from batchnorm.diagnose.check import neighbours
from batchnorm.diagnose.check.known import Known, is_frozen
from batchnorm.diagnose.check.seen import SeenByLayer
from batchnorm.diagnose.observe import Seen, in_evaluation, observed
from batchnorm.layers import BatchNorm
from batchnorm.models.batches import (
    Buffers,
    CallModel,
    call_with,
    limited,
    progress_bar,
    rng_states,
    set_rng_states,
)
from batchnorm.models.walk import batch_norms


def look(
    known: Known,
    data: Iterable[Any],
    call: CallModel | None,
    max_batches: int | None,
    progress: bool,
) -> None:
    """Note what data show of a model; modes, buffers and random numbers are restored.

    Args:
        known: What is known of the model, where it is noted.
        data: The batches.
        call: Calls the model with a batch.
        max_batches: How many batches at most.
        progress: Whether to show how far it is.

    Raises:
        ValueError: There are no batches.
        TypeError: A batch cannot be passed to the model.
    """
    model = known.model
    by_batch = [layer for layer in batch_norms(model).values() if not is_frozen(model, layer)]
    kept, random = [Buffers(m) for m in (model, *known.copies.values())], rng_states()
    try:
        with ExitStack() as stack:
            advance = stack.enter_context(progress_bar("checking", data, max_batches, 1, progress))
            for m in (model, *known.copies.values()):
                stack.enter_context(in_evaluation(m))
            for batch in limited(data, max_batches):
                examples = examples_in(batch)
                labels = labels_in(batch, examples)
                evaluated = _observe(model, known.layers, known.seen, batch, call)
                with _by_the_batch(by_batch):
                    try:
                        others = call_with(model, batch, call)
                    except ValueError:  # one value a channel has no variance
                        others = None
                if known.batches == 0:
                    known.neighbours = neighbours.look(
                        model, known.layers, partial(call_with, model, batch, call)
                    )
                for name, copy in known.copies.items():
                    seen = known.of_copies.setdefault(name, {})
                    _observe(copy, batch_norms(copy), seen, batch, call)
                known.add(evaluated, others, labels)
                advance()
    finally:
        set_rng_states(random)
        for buffers in kept:
            buffers.restore()
    if known.batches == 0:
        raise ValueError("there are no batches to check with: data is empty")


def _observe(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    found: dict[str, SeenByLayer],
    batch: Any,
    call: CallModel | None,
) -> Any:
    """Return what a model returns for a batch, and note what its layers get."""
    examples, first = examples_in(batch), set(layers)

    def see(name: str, seen: Seen) -> None:
        found.setdefault(name, SeenByLayer()).add(seen, examples, name in first)
        first.discard(name)

    with observed(layers, see):
        return call_with(model, batch, call)


def _waits(layer: _BatchNorm) -> bool:
    """Return whether a layer, by the batch, would wait for other processes: torch's own."""
    if not isinstance(layer, nn.SyncBatchNorm) or isinstance(layer, BatchNorm):
        return False
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _by_the_batch(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let layers normalize by the batch's own moments, inside, and update nothing.

    A layer in training that tracks no statistics does that, those of torch and ours. Among several
    processes each is on its own: not all of them need to have as many batches.
    """
    before = []
    for layer in layers:
        if _waits(layer):
            continue
        before.append((layer, dict(vars(layer))))
        layer.training, layer.track_running_stats = True, False
        if getattr(layer, "process_group", None) is not None:
            layer.process_group = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, values in before:
            for name in ("training", "track_running_stats", "process_group"):
                if name in values:
                    vars(layer)[name] = values[name]
