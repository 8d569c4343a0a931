"""Claim 5: batch normalization cures vanishing and exploding gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import curve, reaching
from batchnorm.study.measures.runs import NotMeasured
from batchnorm.study.networks import maps
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Result, Run, State

_RECIPES = {
    "plain, Xavier": Recipe("plain", initialization="xavier"),
    "plain, He": Recipe("plain", initialization="he"),
    "batchnorm": NORMALIZED,
}
_PLAIN = ("plain, Xavier", "plain, He")
_STYLES = {"plain, Xavier": "plain", "plain, He": "ghost", "batchnorm": "batchnorm"}


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
        name: plan.runs(part, recipe, probes=(gradient_norms,)) for name, recipe in _RECIPES.items()
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
        {name: difference(of["batchnorm"], of[name]) for name in _PLAIN} for of in (start, later)
    )
    return Finding(
        part,
        f"From the last hidden layer of the {part} network to the first, gradients change by "
        f"{_mean(start['plain, Xavier']):.1f} orders of magnitude at the start and "
        f"{_mean(later['plain, Xavier']):.1f} in training (with He’s initialization "
        f"{_mean(start['plain, He']):.1f} and {_mean(later['plain, He']):.1f}); with batch "
        f"normalization by {_mean(start['batchnorm']):.1f} and {_mean(later['batchnorm']):.1f}.",
        str(during["plain, Xavier"]),
        f"{_mean(later['plain, Xavier']):.1f}",
        f"{_mean(later['batchnorm']):.1f}",
        {
            "evener at the start than plain from Xavier's": first["plain, Xavier"].high < 0,
            "evener in training than plain from Xavier's": during["plain, Xavier"].high < 0,
            "evener in training than plain from He's": during["plain, He"].high < 0,
        },
        [
            Row(name, f"orders of magnitude, {when}", of[name], effects.get(name))
            for when, of, effects in (
                ("at the start", start, first),
                ("in training", later, during),
            )
            for name in runs
        ],
    )


def _at_the_start(result: Result) -> float:
    return unevenness(result.seen(gradient_norms)[0])


def _in_training(result: Result) -> float:
    looks = result.seen(gradient_norms)[1:]
    return sum(map(unevenness, looks)) / len(looks)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
    measured="A dense network of ten hidden layers of 50 units is trained for 60 steps with its "
    "usual learning rate, plain from Xavier's and from He's initialization, and normalized. The "
    "root mean square of the gradient of each layer's output, before normalization and "
    "activation, is taken before the first step, and now and then in training, until a run that "
    "explodes breaks off. The unevenness is how many orders of magnitude lie between "
    "the first layer and the last hidden one: 0 if gradients neither vanish nor explode.",
    rule="It holds for a network if the 95% interval over the seeds of the difference in "
    "unevenness, normalized minus plain, is below 0 at the start, and in training against plain "
    "from either initialization.",
    unit="orders of magnitude",
    parts=("deep sigmoid", "deep relu", "deep tanh", "deep elu"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
