"""What is seen of the batch norms of a network while it runs, and what all of it says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.diagnose.evidence import (
    REPLICATES,
    Compared,
    Evidence,
    corrected,
    discovered,
    excess,
    p_value,
)
from batchnorm.diagnose.observe import Seen
from batchnorm.diagnose.shift_report import ChannelShift, LayerShift, ShiftReport
from batchnorm.models.walk import batch_norms

#: The level of the tests, unless another is asked for.
ALPHA = 0.05
#: What is no shift, however sure it is: the distance of channels whose means have all moved by a
#: tenth of a standard deviation.
TOLERANCE = 0.01
#: A shift that begins later than this, as a part of the depth, is not in the inputs.
_EARLY = 0.25


class Look:
    """What is seen of the layers of a network, and what it says.

    Args:
        layers: Their names, and the evidence of each.
        most: At how many positions of an example, drawn for each; at all if left out.
        seed: What replicates and positions are drawn by.
    """

    def __init__(
        self, layers: Mapping[str, Evidence], most: int | None = None, seed: int = 0
    ) -> None:
        self.evidence = dict(layers)
        self.order: dict[str, None] = {}
        self._most = most
        self._generator = torch.Generator().manual_seed(seed)
        self._weights: dict[int, Tensor] = {}
        self._batches, self._calls = 0, Counter[str]()
        self._examples: int | None = None

    def begin(self, examples: int | None = None) -> None:
        """Say that other examples come.

        Args:
            examples: How many, where that is known.
        """
        self._weights.clear()
        self._examples = examples

    def __call__(self, name: str, seen: Seen) -> None:
        """See what a layer got."""
        x, places = seen.rows(self._most, self._generator, examples=self._examples)
        self.evidence[name].add(x, places, self._weights_of(name, x))

    def add_each(self, found: Mapping[str, Tensor]) -> None:
        """See other examples, of which each layer's two numbers a channel are known.

        Args:
            found: By the names of the layers, in their order; see `Evidence.add_each`.
        """
        self.begin()
        for name, of_each in found.items():
            self.evidence[name].add_each(of_each, self._weights_of(name, of_each))

    def _weights_of(self, name: str, x: Tensor) -> Tensor:
        """Return the weights of the examples: the same for all layers that get as many."""
        self._batches += not self._weights
        self._calls[name] += 1
        self.order.setdefault(name)
        count = len(x)
        if count not in self._weights:
            drawn = torch.randn((REPLICATES, count), generator=self._generator)
            self._weights[count] = drawn.to(x.device)
        return self._weights[count]

    @property
    def count(self) -> int:
        """How many examples the layer saw that saw most; used twice, it sees each of them once."""
        return max(
            (
                round(self.evidence[name].count * self._batches / max(calls, self._batches))
                for name, calls in self._calls.items()
            ),
            default=0,
        )

    def report(self, alpha: float = ALPHA, tolerance: float = TOLERANCE) -> ShiftReport:
        """Return what all of it says.

        Args:
            alpha: The level of the tests.
            tolerance: What is no shift, however sure it is.

        Raises:
            ValueError: No layer saw two examples.
        """
        left = {name: "it did not run" for name in self.evidence if name not in self.order}
        found: dict[str, Compared] = {}
        for name in self.order:
            count = self.evidence[name].count
            if count < 2:
                left[name] = f"it saw {count} finite examples: two or more are needed"
            else:
                found[name] = self.evidence[name].compare()
        if not found:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in left.items())
            if not self._batches and not self.order:
                why = "there are none, or the model calls no batch norm"
            raise ValueError(f"no batch norm says anything of these data: {why}")
        z = [excess([compared]) for compared in found.values()]
        p = corrected([p_value(each) for each in z])
        scores = [max(float((c.distance - c.noise).mean()), 0.0) for c in found.values()]
        of_channels = torch.cat([c.p_values().cpu() for c in found.values()])
        far = torch.cat([c.distance - c.noise for c in found.values()]).cpu() > tolerance
        sizes = [len(c.mean) for c in found.values()]
        moved = torch.split(discovered(of_channels, alpha) & far, sizes)
        layers = {
            name: LayerShift(
                scores[at],
                float(compared.noise.mean()),
                p[at],
                p[at] <= alpha and scores[at] > tolerance,
                (len(compared.mean), int(moved[at].sum())),
            )
            for at, (name, compared) in enumerate(found.items())
        }
        overall = p_value(excess(list(found.values())))
        score = max(math.fsum(scores) / len(scores), 0.0)
        shifted = overall <= alpha and score > tolerance
        return ShiftReport(
            shifted,
            score,
            math.fsum(layer.noise for layer in layers.values()) / len(layers),
            overall,
            _kind(list(layers.values())) if shifted else "none",
            self.count,
            max(evidence.not_finite for evidence in self.evidence.values()),
            layers,
            _channels(found, moved),
            left,
        )


def _kind(layers: list[LayerShift]) -> Literal["input", "semantic"]:
    scores = [layer.score for layer in layers]
    most = scores.index(max(scores))  # where no layer is sure by itself
    begins = next((at for at, layer in enumerate(layers) if layer.shifted), most)
    return "input" if begins <= _EARLY * (len(layers) - 1) else "semantic"


def _channels(found: Mapping[str, Compared], moved: Iterable[Tensor]) -> list[ChannelShift]:
    """Return all channels, those that moved most first."""
    channels = [
        ChannelShift(name, at * c.step, *numbers, bool(is_moved[at]))
        for (name, c), is_moved in zip(found.items(), moved, strict=True)
        for at, numbers in enumerate(
            zip(
                (c.distance - c.noise).tolist(), c.mean.tolist(), c.ratio.tolist(),
                c.p_values().tolist(), strict=True,
            )
        )
    ]  # fmt: skip
    return sorted(channels, key=lambda channel: -channel.score)


def check_settings(max_batches: int | None, train_batch_size: int) -> None:
    """Raise ValueError if a number is too small."""
    for what, number in (("max_batches", max_batches), ("train_batch_size", train_batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{what} is {number}: expected 1 or more")


def known(
    model: nn.Module, layers: Mapping[str, _BatchNorm], train_batch_size: int
) -> tuple[dict[str, Evidence], dict[str, str]]:
    """Return what `evidence_of` does, of a model that has kept statistics.

    Args:
        model: The model.
        layers: Its layers.
        train_batch_size: How many examples a batch of the training run had.

    Raises:
        ValueError: It has none.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} has no size yet, being lazy: call the model once first")
    evidence, left = evidence_of(layers, train_batch_size)
    if not evidence:
        why = "; ".join(f"{name or 'itself'}: {reason}" for name, reason in left.items())
        others = [type(m).__name__ for m in batch_norms(model, alike=True).values()]
        raise ValueError(
            f"this {type(model).__name__} has no running statistics to compare with ("
            + (why or f"no batch norm{' but ' + others[0] if others else ' at all'}")
            + "): "
            + (
                "convert it first, bn.convert(model)"
                if others and not layers
                else "take the model as it was before it was folded, or calibrate it"
            )
        )
    return evidence, left


def evidence_of(
    layers: Mapping[str, _BatchNorm], train_batch_size: int, most: int | None = None
) -> tuple[dict[str, Evidence], dict[str, str]]:
    """Return the evidence, still empty, of every layer that has kept statistics.

    Args:
        layers: The layers.
        train_batch_size: How many examples a batch of the training run had.
        most: About how many channels of each, evenly over all of them; all if left out.

    Returns:
        The evidence, and the layers that are left out, each with the reason.
    """
    found: dict[str, Evidence] = {}
    left: dict[str, str] = {}
    for name, layer in layers.items():
        mean, var = layer.running_mean, layer.running_var
        if mean is None or var is None:
            left[name] = "it has no running statistics"
        elif mean.is_meta or not bool((mean.isfinite() & (var >= 0) & var.isfinite()).all()):
            left[name] = "its running statistics are no mean and variance: see bn.check"
        else:
            step = 1 if most is None else max(len(mean) // most, 1)
            behind = _behind(layer, train_batch_size)
            found[name] = Evidence(mean, var, layer.eps, behind, step)
    return found, left


def _behind(layer: _BatchNorm, batch_size: int) -> float:
    """Return how many examples have the noise of a layer's running statistics.

    An average with momentum a weighs the batch k steps ago by a (1 - a)^k, and the variance of such
    an average is a / (2 - a) of that of one batch.
    """
    momentum, tracked = layer.momentum, layer.num_batches_tracked
    if momentum is not None:
        return batch_size * (2 - momentum) / momentum if 0 < momentum <= 1 else math.inf
    return batch_size * float(tracked) if tracked is not None and int(tracked) else math.inf
