"""Claim 14: without gamma and beta a sigmoid is held to its linear part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import beside, curve, steps_axis
from batchnorm.study.measures.runs import NotMeasured, each, final, learned, whole
from batchnorm.study.networks import activations
from batchnorm.study.observation import State
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.store import Store
from batchnorm.study.training import Run

# tanh(z) is 2 sigmoid(2z) - 1: between these it is as near to a line as the sigmoid is.
_LINEAR = {nn.Sigmoid: (0.2, 0.8), nn.Tanh: (-0.6, 0.6)}
_TOLERANCE = 1e-3  # of a float32 loss: training lets rounding grow from step to step
_RECIPES = {
    "trained": NORMALIZED,
    "fixed": replace(NORMALIZED, affine="fixed"),
    "absent": replace(NORMALIZED, affine="absent"),
}
# The lines of the last two lie on each other: the wide one shows on both sides.
_STYLES = {"trained": "batchnorm", "fixed": "torch", "absent": "renormalized"}


def linear_share(state: State) -> list[list[float]]:
    """Return what each activation does with the examples to try, from the inputs on.

    That is the share of its outputs in the linear part; and of what comes in, over the examples,
    the size of the mean and the standard deviation, both on the mean over the units. The examples
    are one batch, normalized by its own moments, so that the running statistics play no part.
    """
    model = state.copy()
    seen: list[list[float]] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        low, high = _LINEAR[type(layer)]
        share = ((output > low) & (output < high)).float().mean()
        (z,) = inputs
        moments = (z.mean(0).abs().mean(), z.std(0).mean())
        seen.append([float(value.clamp(0, 1e30)) for value in (share, *moments)])

    for activation in activations(model):
        activation.register_forward_hook(look)
    with torch.no_grad():
        model(state.held_out[0])
    return seen


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs with gamma and beta trained, fixed, and absent."""
    return [run for name in _RECIPES for run in _runs(plan, part, name)]


def _runs(plan: Plan, part: str, name: str) -> list[Run]:
    return plan.runs(part, _RECIPES[name], probes=(linear_share,))


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare the shares in the linear part, and the accuracies."""

    def last(column: int) -> dict[str, list[float]]:
        """What was seen at the end, on the mean over the layers."""
        return {
            name: each(
                store,
                _runs(plan, part, name),
                lambda result: float(np.mean(result.seen(linear_share)[-1], axis=0)[column]),
            )
            for name in _RECIPES
        }

    shares = {name: [100 * share for share in of] for name, of in last(0).items()}
    ends = _accuracies(plan, part, store)
    if not learned(max(float(np.mean(of)) for of in ends.values()) / 100, plan):
        raise NotMeasured(f"The {part} network learned nothing.")
    more = difference(shares["absent"], shares["trained"], " points")
    higher = difference(ends["trained"], ends["absent"], " points")
    apart = _apart(plan, part, store)
    without, with_ = (float(np.mean(shares[name])) for name in ("absent", "trained"))
    return Finding(
        part,
        f"Without gamma and beta, {without:.1f}% of the {part} network's activations are in the "
        f"linear part at the end, with them {with_:.1f}%: {more} without. They change the "
        f"accuracy by {higher}. Fixed or absent, the losses differ by {max(apart):.1g} at most.",
        str(replace(more, unit="")),
        f"{without:.1f}%",
        f"{with_:.1f}%",
        {
            "more in the linear part without them": more.low > 0,
            "more accurate with them": higher.low > 0,
            "fixed and absent are the same": max(apart) <= _TOLERANCE,
        },
        [
            *_rows("activations in the linear part, %", shares, " points"),
            *_rows("accuracy, %", ends, " points"),
            *_rows("size of the mean that comes in", last(1)),
            *_rows("standard deviation that comes in", last(2)),
            Row("fixed against absent", "largest difference of a loss", apart),
        ],
    )


def _accuracies(plan: Plan, part: str, store: Store) -> dict[str, list[float]]:
    return {
        name: each(store, _runs(plan, part, name), lambda result: 100 * final(result))
        for name in _RECIPES
    }


def _apart(plan: Plan, part: str, store: Store) -> list[float]:
    """For each seed, the largest difference between the losses with them fixed and absent."""
    fixed, absent = (whole(store, _runs(plan, part, name)) for name in ("fixed", "absent"))
    return [
        float(np.abs(np.subtract(a.losses, b.losses)).max())
        for a, b in zip(fixed, absent, strict=True)
    ]


def _rows(measure: str, values: dict[str, list[float]], unit: str = "") -> list[Row]:
    trained = values["trained"]
    return [
        Row(name, measure, of, None if of is trained else difference(of, trained, unit))
        for name, of in values.items()
    ]


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the shares while the networks learn, and the accuracies at the end."""
    return [
        Chart(
            "linear-part",
            "How many of the activations are in the linear part while the networks learn, with "
            "gamma and beta trained, fixed at 1 and 0, and absent. Lines are medians over the "
            "seeds, bands reach from the lowest to the highest.",
            [_panel(plan, part, store) for part in parts],
        ),
        Chart(
            "affine-accuracy",
            "Held-out accuracy of the same networks at the end. Each dot is a seed, the bars are "
            "medians.",
            [
                beside(
                    part,
                    "held-out accuracy at the end, %",
                    _accuracies(plan, part, store),
                    styles=list(_STYLES.values()),
                )
                for part in parts
            ],
        ),
    ]


def _panel(plan: Plan, part: str, store: Store) -> Panel:
    lines = []
    for name, style in _STYLES.items():
        results = whole(store, _runs(plan, part, name))
        steps = [max(step, 1) for step in results[0].at(linear_share)]  # a logarithm has no 0
        shares = [
            [100 * float(np.mean(seen, axis=0)[0]) for seen in result.seen(linear_share)]
            for result in results
        ]
        lines.append(curve(style, steps, shares, name))
    return Panel(
        part,
        steps_axis(plan, part),
        Axis("activations in the linear part, %", 0, 102),
        lines,
    )


CLAIM = Claim(
    number=14,
    name="affine",
    title="Gamma and beta free it of the linear part",
    says="Without gamma and beta a sigmoid would be held to its linear part, about (0.2, 0.8): its "
    "inputs would have mean 0 and variance 1 for good. Gamma and beta let them have any mean and "
    "variance. For it: they are worth 0.5 to 2 points of accuracy in residual networks, and "
    "trained alone, with random weights, they learn a surprising amount (Frankle et al. 2020, "
    "arXiv:2003.00152). Against it: a standard normal input leaves (0.2, 0.8) for 17% of the "
    "examples, so the sigmoid is not linear without them either; and the next linear map can do a "
    "part of their work.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3",
    measured="The normalized network is trained at its usual learning rate with gamma and beta "
    "trained, fixed at 1 and 0, and absent, from the same initial weights, on the same batches. "
    "We count the activations that are in the linear part when up to 2000 held-out examples pass "
    "as one batch, normalized by its own moments: between 0.2 and 0.8 for the sigmoid, and between "
    "-0.6 and 0.6 for tanh, which is a sigmoid stretched to twice its height and half its width; "
    "all hidden layers count equally. The accuracy is the held-out one, the mean of the last three "
    "evaluations.",
    rule="It holds for a network if more of its activations are in the linear part with gamma and "
    "beta absent than trained, if it is more accurate with them trained than absent, both with a "
    "95% interval of the difference over the seeds above\u00a00, and if no loss differs by more "
    f"than {_TOLERANCE:g} with them fixed and with them absent.",
    unit="in the linear part",
    parts=("sigmoid", "tanh"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
