"""What stands before batch norms: biases that do nothing, and dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.check.finding import Finding, number, spelled
from batchnorm.diagnose.check.gap import HARMLESS
from batchnorm.diagnose.check.tape import Step, Tape

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known

_RANKS = (1, 2, 3)
_MAPS = {
    "linear",
    *(f"conv{rank}d" for rank in _RANKS),
    *(f"conv_transpose{rank}d" for rank in _RANKS),
}
_AVERAGES = {
    "mean",
    *(f"avg_pool{rank}d" for rank in _RANKS),
    *(f"adaptive_avg_pool{rank}d" for rank in _RANKS),
}
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose",
    "movedim", "swapaxes", "contiguous", "clone", "to", "float", "double", "half", "bfloat16",
}  # fmt: skip
_DROPOUTS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout",
}  # fmt: skip


@dataclass
class Neighbours:
    """What was seen before the batch norms, in one call of the model.

    Attributes:
        biases: For a bias, by its name, the layers that take it away, if all that read it do.
        dropouts: For a layer, the p of a dropout before it, and how many linear maps lie between.
    """

    biases: dict[str, list[str]] = field(default_factory=dict)
    dropouts: dict[str, tuple[float, int]] = field(default_factory=dict)


def look(
    model: nn.Module, layers: Mapping[str, _BatchNorm], run: Callable[[], object]
) -> Neighbours:
    """Return what stands before the layers.

    Args:
        model: The model, in evaluation.
        layers: The batch norms, by name.
        run: Calls the model, and returns what it returns.
    """
    found, tape = Neighbours(), Tape()
    with tape, _opaque(layers, tape):
        output = run()
    tape.read(output, None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, list[str | None]] = {}
    for step in tape.steps:
        name = names.get(id(step.bias)) if step.what in _MAPS else None
        if name is not None:
            uses.setdefault(name, []).append(_norm_after(step, layers))
    for bias, ends in uses.items():
        norms = [end for end in dict.fromkeys(ends) if end is not None]
        if None not in ends:
            found.biases[bias] = norms
    for name, steps in tape.before.items():
        for before in steps:
            dropout = _dropout_before(before)
            if dropout is not None:
                found.dropouts[name] = dropout
    return found


@contextmanager
def _opaque(layers: Mapping[str, _BatchNorm], tape: Tape) -> Iterator[None]:
    """Let the layers be one step each, inside."""
    handles = []
    for name, layer in layers.items():
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, keywords, name=name: tape.enter(
                    name, args[0] if args else keywords["input"]
                ),
                with_kwargs=True,
            )
        )
        handles.append(layer.register_forward_hook(lambda *_: tape.leave()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm_after(step: Step, layers: Mapping[str, _BatchNorm]) -> str | None:
    """Return the one layer that reads what a step makes, however it lies in memory, or None."""
    assert step.bias is not None  # as the caller saw
    channels, moved = step.bias.numel(), False
    while len(step.readers) == 1:
        reader = step.readers[0]
        if isinstance(reader, str):
            sizes = step.shape
            known = layers[reader].num_features == channels
            # which dimension has the channels is seen by the size, where something was moved
            return reader if known and not (moved and sizes.count(channels) > 1) else None
        if reader is None or reader.what not in _VIEWS:
            return None
        step, moved = reader, True
    return None


def _dropout_before(step: Step | None) -> tuple[float, int] | None:
    maps = 0
    while step is not None:
        if step.what in _DROPOUTS and step.p > 0:
            return step.p, maps
        if step.what in _MAPS | _AVERAGES:
            maps += 1
        elif step.what not in _VIEWS | _DROPOUTS:
            return None
        step = step.source
    return None


def find(known: Known) -> Iterator[Finding]:
    """Find biases that do nothing, and dropout that the statistics take in."""
    for bias, layers in known.neighbours.biases.items():
        if any(known.is_frozen(layer) for layer in layers):  # whose mean does not follow it
            continue
        owner, _, attribute = bias.rpartition(".")
        written = f"{spelled(known.model, owner)}.{attribute}"
        moved = [
            f"{known.spelled(layer)}.running_mean -= {written}.detach()"
            for layer in layers
            if known.layers[layer].running_mean is not None
        ]
        yield Finding(
            "bias_before_norm",
            "note",
            layers[0],
            f"all {known.layers[layers[0]].num_features} values of {bias!r} go into "
            f"{'this layer' if len(layers) == 1 else f'{len(layers)} batch norms'} alone",
            "the mean is subtracted, and the bias with it: memory and time for nothing",
            "; ".join([*moved, f"{written} = None"]),
        )
    for layer, (p, maps) in known.neighbours.dropouts.items():
        if layer not in known.layers or known.is_frozen(layer):
            continue
        between = "nothing" if not maps else "a linear map" if maps == 1 else f"{maps} linear maps"
        evidence = f"dropout with p = {number(p)} stands before it, with {between} between"
        seen = known.seen.get(layer)
        if not maps and p < 1 and seen is not None and seen.moments is not None:
            square = seen.moments.mean.square() + seen.variance()
            ratios = 1 + p / (1 - p) * square / seen.variance().clamp(min=known.layers[layer].eps)
            ratio = number(float(ratios.median()))
            evidence += f"; the variance in training is {ratio} times as large"
        gap = known.gaps.get(layer)
        yield Finding(
            "dropout_before_norm",
            "note" if gap is not None and gap.distance < HARMLESS else "warning",
            layer,
            evidence,
            "in training its variance is part of the statistics, in evaluation it is gone: move "
            "the dropout behind the last batch norm, or take statistics without it",
            known.recalibrated(layer),
        )
