"""A page that says how far data have shifted, and what to do, to who has read nothing else."""

from __future__ import annotations

from dataclasses import replace

from batchnorm.cli import shift_words as words
from batchnorm.cli.page import code, framed, picture, text
from batchnorm.diagnose.shift_report import ShiftReport, p_text
from batchnorm.study.errors import printable
from batchnorm.study.markup import table

#: How many channels are listed, those that moved most.
_CHANNELS = 20
_READING = (
    "Each batch norm of the model has kept the mean and the variance of what it got in training, "
    "channel by channel. Here the data went through the model, and what the batch norms got was "
    "compared with that. No training data and no labels are needed for it.",
    "The score of a channel is 0 if its mean and variance are as in training. If only the mean has "
    "moved, by d standard deviations, it is d²: 0.01 is a tenth of one, 1 is one. (It is the "
    "symmetric Kullback-Leibler divergence of normal distributions, in nats.) The score of a layer "
    "is the mean over its channels, that of the model the mean over its layers. What so many "
    "examples would give by chance has been taken off.",
    "p says how probable such a score would be by chance, if nothing had shifted; those of the "
    "layers are corrected for how many there are. A layer has shifted if p is at most 0.05 and its "
    "score above 0.01. Less than that is no shift, however sure it is.",
    "A shift that begins at the first layers is one of the inputs: another camera, other light, "
    "other preparation. One that begins later is one of what the inputs show. Neither says by "
    "itself that predictions are worse: only labels can.",
)


def page(report: ShiftReport, model: object, data: str) -> str:
    """Return the page: whole, without scripts, and loading nothing.

    Args:
        report: What was measured.
        model: What is called the model.
        data: What the data are called.
    """
    todo = "".join(f"<li>{code(step)}</li>" for step in words.advice(report))
    layers_drawn = {printable(name): layer for name, layer in report.layers.items()}
    drawn = picture(replace(report, layers=layers_drawn).plot, "scores of layers and channels")
    layers = table(
        ("batch norm", "score", "by chance", "p", "channels shifted", ""),
        (
            (
                text(name or "itself"),
                f"{layer.score:.3g}",
                f"{layer.noise:.2g}",
                p_text(layer.p_value),
                "{1} of {0}".format(*layer.channels),
                "shifted" if layer.shifted else "",
            )
            for name, layer in report.layers.items()
        ),
    )
    channels = table(
        ("batch norm", "channel", "score", "mean", "variance"),
        (
            (
                text(channel.layer or "itself"),
                str(channel.channel),
                f"{channel.score:.3g}",
                f"{channel.mean:+.2f} standard deviations",
                f"×{channel.ratio:.3g}",
            )
            for channel in report.channels[:_CHANNELS]
        ),
    )
    left = table(
        ("left out", "because"), ((text(n or "itself"), w) for n, w in report.left.items())
    )
    main = f"""{f"<section><h2>What to do</h2><ol>{todo}</ol></section>" if todo else ""}
<section>
<h2>Where it is</h2>
<figure>{drawn}
<figcaption>Left: the score of each layer, from the inputs down. Right: each channel, by how far its
mean and its variance have moved; without a shift all are near 0 and 1.</figcaption></figure>
{layers}
{left if report.left else ""}
<h3>The channels that moved most, of {len(report.channels):,}</h3>
{channels}
</section>"""
    return framed(
        words.verdict(report),
        words.meaning(report),
        words.numbers(report),
        main,
        _READING,
        model=model,
        data=data,
    )
