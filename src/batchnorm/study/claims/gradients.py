"""Claim 5: batch normalization cures vanishing and exploding gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import Interval, difference
from batchnorm.study.measures.drawing import curve, reaching
from batchnorm.study.measures.runs import NotMeasured, final
from batchnorm.study.networks import maps
from batchnorm.study.observation import Result, State
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_STEPS = 150  # enough for the networks that can learn to do so
_FROM = ("Xavier", "He")
_RECIPES = {
    f"{norm}, {start}": replace(recipe, initialization=start.lower())
    for norm, recipe in (("plain", PLAIN), ("norm", NORMALIZED))
    for start in _FROM
}
_STYLES = dict(zip(_RECIPES, ("plain", "ghost", "batchnorm", "after"), strict=True))


def gradient_norms(state: State) -> list[float]:
    """Return the root mean square of the gradient of each map's output, from the inputs on."""
    model = state.copy()
    outputs: list[Tensor] = []
    for layer in maps(model):
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    x, y = state.batch
    gradients = torch.autograd.grad(cross_entropy(model(x), y), outputs)
    return [float(gradient.square().mean().sqrt().clamp(1e-30, 1e30)) for gradient in gradients]


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs without and with normalization, from either initialization."""
    return [run for runs in _runs(plan, part).values() for run in runs]


def _runs(plan: Plan, part: str) -> dict[str, list[Run]]:
    return {
        name: plan.runs(part, recipe, steps=_STEPS, probes=(gradient_norms,))
        for name, recipe in _RECIPES.items()
    }


def unevenness(norms: Sequence[float]) -> float:
    """Return how many orders of magnitude lie between the first gradient and the last hidden one.

    Example:
        >>> unevenness([1e-5, 1e-3, 1e-2, 1.0])  # the last one is the output's
        3.0
    """
    return abs(math.log10(norms[0] / norms[-2]))


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare gradients at the two ends of a network, at the start and while it learns."""
    runs = _runs(plan, part)
    results = {name: [store[run] for run in of] for name, of in runs.items()}
    if any(len(result.seen(gradient_norms)) < 2 for of in results.values() for result in of):
        raise NotMeasured(f"A run of the {part} network broke off at once.")
    start = {name: list(map(_at_the_start, of)) for name, of in results.items()}
    later = {name: list(map(_in_training, of)) for name, of in results.items()}
    first, during = (
        {f"norm, {name}": difference(of[f"norm, {name}"], of[f"plain, {name}"]) for name in _FROM}
        for of in (start, later)
    )
    lost = difference(later["plain, He"], start["plain, He"])
    means = {
        name: f"{np.mean(start[name]):.1f} and {np.mean(later[name]):.1f}" for name in _RECIPES
    }
    return Finding(
        part,
        f"From the last hidden layer of the plain {part} network to the first, gradients change "
        f"by {means['plain, Xavier']} orders of magnitude at the start and in training from "
        f"Xavier’s initialization, and by {means['plain, He']} from He’s; with batch "
        f"normalization by {means['norm, Xavier']}, and by {means['norm, He']}. Plain from He’s, "
        f"the change from the start to training is {lost}.",
        str(during["norm, Xavier"]),
        f"{np.mean(later['plain, Xavier']):.1f}",
        f"{np.mean(later['norm, Xavier']):.1f}",
        {
            **{
                f"evener at the start, from {name}'s": first[f"norm, {name}"].high < 0
                for name in _FROM
            },
            **{
                f"evener in training, from {name}'s": during[f"norm, {name}"].high < 0
                for name in _FROM
            },
            "plain from He's less even in training than at the start": lost.low > 0,
        },
        [
            *_rows("orders of magnitude, at the start", start, first),
            *_rows("orders of magnitude, in training", later, during),
            Row(
                "plain, He, in training − start",
                "orders of magnitude",
                np.subtract(later["plain, He"], start["plain, He"]).tolist(),
                lost,
            ),
            *_rows(
                "held-out accuracy at the end, %",
                {name: [100 * final(result) for result in of] for name, of in results.items()},
                {},
            ),
        ],
    )


def _rows(
    measure: str, values: Mapping[str, list[float]], effects: Mapping[str, Interval]
) -> list[Row]:
    return [Row(name, measure, of, effects.get(name)) for name, of in values.items()]


def _at_the_start(result: Result) -> float:
    return unevenness(result.seen(gradient_norms)[0])


def _in_training(result: Result) -> float:
    """The mean over the last third of the looks, or what there is of it."""
    looks = result.seen(gradient_norms)
    return float(np.mean([unevenness(look) for look in looks[-max(1, len(looks) // 3) :]]))


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the gradient of each layer, at the start and at the end."""
    return [
        Chart(
            "gradients-by-depth",
            "The root mean square of the gradient of each layer’s output, from the inputs (1) to "
            "the output, before the first step and at the end. Lines are medians over the seeds.",
            [
                _panel(plan, part, store, look, when)
                for look, when in ((0, "at the start"), (-1, "at the end"))
                for part in parts
            ],
        )
    ]


def _panel(plan: Plan, part: str, store: Store, look: int, when: str) -> Panel:
    lines = []
    for name, runs in _runs(plan, part).items():
        norms = [store[run].seen(gradient_norms)[look] for run in runs]
        depth = range(1, len(norms[0]) + 1)
        lines.append(curve(_STYLES[name], depth, norms, name))
    return Panel(
        f"{part}, {when}",
        Axis("layer", 1, len(lines[0].x), ticks=[(at, f"{at}") for at in lines[0].x]),
        reaching("gradient, root mean square", [line.y for line in lines], log=True),
        lines,
    )


CLAIM = Claim(
    number=5,
    name="gradients",
    title="Gradients neither vanish nor explode",
    says="Batch normalization cures vanishing and exploding gradients; He's initialization does "
    "so only at the beginning of training. Against it: at initialization, batch normalization "
    "itself makes gradients grow exponentially with depth in networks without shortcuts, by a "
    "factor of about 1.2 a layer with ReLU (Yang et al. 2019, arXiv:1902.08129).",
    source="lecture notes; Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.3; He et al. 2015 "
    "(arXiv:1502.01852)",
    measured=f"A dense network of ten hidden layers of 50 units is trained for {_STEPS} steps "
    "with its usual learning rate, plain and normalized, each from Xavier's and from He's "
    "initialization, with the same initial weights for both. The root mean square of the gradient "
    "of each layer's output, before normalization and activation, is taken before the first step, "
    "each time that the steps have grown by half, and at the end, or until a run that explodes "
    "breaks off. The unevenness is how many orders of magnitude lie between the first layer and "
    "the last hidden one: 0 if gradients neither vanish nor explode. In training means the mean "
    "over the last third of the looks, from step 62 on in a whole run. The accuracy at the end is "
    "told beside it, as gradients may be even in a network that does not learn; it is 0 for a run "
    "that broke off.",
    rule="It holds for a network if the 95% interval over the seeds of the difference in "
    "unevenness, normalized minus plain from the same initialization, is below 0 for either "
    "initialization, at the start and in training, and if that of the plain network from He's "
    "initialization, in training minus at the start, is above 0: it helps only at the beginning.",
    unit="orders of magnitude",
    parts=("deep sigmoid", "deep relu", "deep tanh", "deep elu"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
