"""What one would rather see of a shift than read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from batchnorm.diagnose.shift_report import ShiftReport

_MOVED, _STILL = "#c4402f", "#7f8c99"
#: The least score that is drawn: what chance leaves is of no interest, and has no logarithm.
_LEAST = 1e-4


def depth_profile(report: ShiftReport) -> Figure:
    """Draw the score of every layer by depth, and how far mean and variance of its channels moved.

    Args:
        report: What was measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    scores, channels = figure.subplots(1, 2)
    places = range(len(report.layers))
    of_each = list(report.layers.values())
    scores.barh(
        places,
        [max(layer.score, _LEAST) - _LEAST for layer in of_each],
        left=_LEAST,
        color=[_MOVED if layer.shifted else _STILL for layer in of_each],
    )
    scores.plot([max(layer.noise, _LEAST) for layer in of_each], places, "|", color="black")
    names = [(name or "itself")[-28:].replace("$", r"\$") for name in report.layers]
    step = max(len(names) // 24, 1)
    scores.set_yticks(list(places)[::step], names[::step], fontsize=7)
    scores.set_xscale("log")
    scores.set_xlim(left=_LEAST)
    scores.invert_yaxis()
    scores.set_xlabel("score, nats; |: what it is by chance")
    scores.set_title("layers, from the inputs down", fontsize=9)
    for moved, color in ((False, _STILL), (True, _MOVED)):
        chosen = [channel for channel in report.channels if channel.shifted == moved]
        channels.plot(
            [channel.mean for channel in chosen],
            [max(channel.ratio, 1e-6) for channel in chosen],
            ".",
            color=color,
            markersize=3,
            label=f"{len(chosen)} {'shifted' if moved else 'as they were'}",
        )
    channels.set_yscale("log")
    low, high = channels.get_ylim()
    channels.set_ylim(min(low, 0.5), max(high, 2))
    channels.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    channels.yaxis.set_major_formatter("{x:g}")
    channels.yaxis.set_minor_formatter(NullFormatter())
    channels.set_xlabel("mean, moved by so many sd")
    channels.set_ylabel("variance, times what it was")
    channels.set_title("channels", fontsize=9)
    channels.legend(fontsize=7, frameon=False)
    for axes in (scores, channels):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
