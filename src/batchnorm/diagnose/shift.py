"""Covariate shift: how far data are from those that a network's running statistics remember."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.diagnose.accuracy import examples_in
from batchnorm.diagnose.evidence import (
    REPLICATES,
    Compared,
    Evidence,
    corrected,
    discovered,
    excess,
    p_value,
)
from batchnorm.diagnose.observe import Seen, in_evaluation, observed
from batchnorm.models.batches import CallModel, call_with, limited, progress_bar
from batchnorm.models.walk import Where, batch_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The level of the tests, unless another is asked for.
ALPHA = 0.05
#: What is no shift, however sure it is: the distance of channels whose means have all moved by a
#: tenth of a standard deviation.
TOLERANCE = 0.01
#: A shift that begins later than this, as a part of the depth, is not in the inputs.
_EARLY = 0.25
_WORST = 5


class ChannelShift(NamedTuple):
    """How far a channel has moved.

    Attributes:
        layer: The layer it is of.
        channel: Its number.
        score: The distance, without what it is by chance.
        mean: How far the mean has moved, in standard deviations of the layer.
        ratio: The variance, relative to that of the layer.
        p_value: How probable that would be by chance.
        shifted: Whether that is no chance, as far as the number of channels allows to say, and the
            score above the tolerance.
    """

    layer: str
    channel: int
    score: float
    mean: float
    ratio: float
    p_value: float
    shifted: bool


@dataclass(frozen=True)
class LayerShift:
    """How far a layer has moved.

    Attributes:
        score: The mean distance of its channels, without what it is by chance.
        noise: What it is by chance.
        p_value: How probable that would be by chance, corrected for the number of layers.
        shifted: Whether that is below the level, and the score above the tolerance.
        channels: The number of channels, and how many of them are shifted.
    """

    score: float
    noise: float
    p_value: float
    shifted: bool
    channels: tuple[int, int]


@dataclass(repr=False)
class ShiftReport:
    """How far data are from those that the running statistics remember.

    Attributes:
        shifted: Whether there is a shift: `p_value` is below the level, `score` above the
            tolerance.
        score: The mean distance of all layers, without what it is by chance: the symmetric
            Kullback-Leibler divergence of normal distributions, in nats.
        noise: What it is by chance, for so many examples.
        p_value: How probable the score would be by chance.
        kind: `"none"`; `"input"`, a shift that begins at the first layers; or `"semantic"`, one
            that begins later: the inputs look as in training, and what they show does not.
        examples: How many were seen.
        not_finite: How many of them were left out by some layer, being NaN or infinite there.
        layers: Every layer, in the order in which they ran.
        channels: The channels of all layers, those that moved most first.
        left: The layers that say nothing, each with the reason.

    Example:
        >>> import batchnorm as bn, torch
        >>> report = bn.measure_shift(bn.BatchNorm(3), torch.randn(64, 3) + 1)
        >>> report.shifted, report.kind, list(report.layers)
        (True, 'input', [''])
    """

    shifted: bool
    score: float
    noise: float
    p_value: float
    kind: Literal["none", "input", "semantic"]
    examples: int
    not_finite: int
    layers: dict[str, LayerShift]
    channels: list[ChannelShift]
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data.

        Example:
            >>> import batchnorm as bn, torch
            >>> layer = bn.BatchNorm(3)
            >>> bn.measure_shift(layer, torch.randn(64, 3)).to_dict()["examples"]
            64
        """
        return {
            **vars(self),
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
            "channels": [channel._asdict() for channel in self.channels],
        }

    def plot(self) -> Figure:
        """Draw the score of every layer, by depth, and the channels that moved most.

        Returns:
            A figure of Matplotlib.

        Example:
            >>> import batchnorm as bn, torch
            >>> bn.measure_shift(bn.BatchNorm(3), torch.randn(64, 3)).plot()
            <Figure size 720x480 with 2 Axes>
        """
        from batchnorm.diagnose.pictures import depth_profile

        return depth_profile(self)

    def __repr__(self) -> str:
        verdict = {
            "none": "no shift",
            "input": "SHIFT of the inputs",
            "semantic": "SHIFT, though not of the inputs",
        }[self.kind]
        lines = [
            f"{verdict}: score {self.score:.3g} nats, p {p_text(self.p_value)}, "
            f"{self.examples:,} examples"
        ]
        if self.shifted:
            moved = [name for name, layer in self.layers.items() if layer.shifted]
            where = f", from {moved[0]!r} on" if moved else " by themselves, but all together"
            lines.append(f"  {len(moved)} of {len(self.layers)} layers{where}")
        width = max((len(name) for name in self.layers), default=0)
        width = min(max(width, 5), 40)
        lines.append(f"  {'layer':<{width}} {'score':>9} {'by chance':>9} {'p':>8}  channels")
        shown = list(self.layers.items())
        rest = len(shown) - 12
        if rest > 0:
            shown = sorted(shown, key=lambda item: -item[1].score)[:10]
        for name, layer in shown:
            all_of, moved_of = layer.channels
            lines.append(
                f"{'*' if layer.shifted else ' ':>2}{(name or 'itself')[-width:]:<{width}} "
                f"{layer.score:9.3g} {layer.noise:9.2g} {p_text(layer.p_value):>8}  "
                f"{moved_of} of {all_of}"
            )
        if rest > 0:
            lines.append(f"  and {rest + 2} more, which moved less")
        for channel in [c for c in self.channels[:_WORST] if c.shifted and self.shifted][:_WORST]:
            lines.append(
                f"  {(channel.layer or 'itself')[-40:]}, channel {channel.channel}: mean "
                f"{channel.mean:+.2f} sd, variance x{channel.ratio:.2f}"
            )
        if self.not_finite:
            lines.append(f"  {self.not_finite:,} examples are not finite, and left out")
        lines += [f"  left {name or 'itself'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def p_text(p: float) -> str:
    """Return a p-value as it is read."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


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


def measure_shift(
    model: nn.Module,
    data: Iterable[Any],
    *,
    call: CallModel | None = None,
    max_batches: int | None = None,
    where: Where = None,
    train_batch_size: int = 32,
    alpha: float = ALPHA,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> ShiftReport:
    """Return how far data are from those that a network was trained on, by its batch norms.

    Each layer has kept the mean and the variance of its inputs in training, channel by channel:
    nothing else of the training data is needed, and no labels. For each channel the distance is

        J = 1/2 [(v + d^2) / w + (w + d^2) / v] - 1        in nats, 0 if nothing moved

    the symmetric Kullback-Leibler divergence of normal distributions with variances v, w, both with
    eps, whose means are d apart. A sample of n examples is off by chance: what that makes of J, to
    first order Var(mean) / v + Var(variance) / (2 v^2), is taken off. It is estimated from how the
    examples differ, as the positions of one are alike, and so is the noise of the running average
    itself. The score of a layer is the mean over its channels, and that of the model over its
    layers.

    Whether it is a shift is tested against what the same examples give by chance, in replicates
    which keep what channels and layers have in common: 5% of samples of the training distribution
    are taken for shifted at the default level, be they 32 or 10,000 examples. Layers are corrected
    for their number by Holm's method, channels by that of Benjamini & Hochberg.

    The data are gone through once, in evaluation and without gradients; the memory that it takes
    does not depend on how many there are. The model is left as it was.

    Args:
        model: The model, with batch norms of `torch.nn` or of ours.
        data: The batches, any iterable; see `calibrate`. A few dozens of examples say something.
        call: Calls the model with a batch; see `calibrate`.
        max_batches: How many batches at most.
        where: Which layers; see `freeze`.
        train_batch_size: How many examples a batch of the training run had: by that and the
            momentum the noise of the running statistics is known.
        alpha: The level of the tests: so many of 1 are false alarms.
        tolerance: A score that is no shift, however sure it is: by default that of channels whose
            means have all moved by a tenth of a standard deviation.
        progress: Whether to show how far it is, on a terminal and where Rich is installed.

    Returns:
        The scores of model, layers and channels, and whether they are a shift.

    Raises:
        ValueError: The model has no batch norm with running statistics, or none that saw two
            finite examples; or `where` names none.
        TypeError: A batch is of no known kind.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)).eval()
        >>> data = torch.randn(1000, 3)
        >>> _ = bn.calibrate(model, [data])
        >>> bn.measure_shift(model, [torch.randn(100, 3)]).shifted
        False
        >>> bn.measure_shift(model, [torch.randn(100, 3) + 1]).shifted
        True

    Source:
        Kullback & Leibler, On information and sufficiency, 1951. Schneider et al., Improving
        robustness against common corruptions by covariate shift adaptation, 2020
        (arXiv:2006.16971), measure shift by what batch norms have kept.
    """
    check_settings(max_batches, train_batch_size)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: expected a number between 0 and 1")
    layers = batch_norms(model, where)
    evidence, left = known(model, layers, train_batch_size)
    look = Look(evidence)
    with (
        in_evaluation(model),
        observed({name: layers[name] for name in evidence}, look),
        progress_bar("shift", data, max_batches, 1, progress) as advance,
    ):
        for batch in limited(data, max_batches):
            look.begin(examples_in(batch))
            call_with(model, batch, call)
            advance()
    report = look.report(alpha, tolerance)
    report.left.update(left)
    return report
