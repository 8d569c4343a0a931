"""What a shift report says: of the model, its layers and its channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
