"""Claim 12: batch normalization fixes the geometry of the loss for the next layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import ratio, short
from batchnorm.study.measures.drawing import coming, coming_axis, curve, ends, reaching
from batchnorm.study.measures.landscape import (
    LENGTHS,
    along_the_gradient,
    changes,
    shares,
    smoothness,
    variations,
)
from batchnorm.study.measures.phases import LEARNING, before, learning
from batchnorm.study.measures.runs import each, geometric
from batchnorm.study.observation import Probe, Result
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_RECIPES = (PLAIN, NORMALIZED)


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs without and with normalization."""
    return [run for recipe in _RECIPES for run in _runs(plan, part, recipe)]


def _runs(plan: Plan, part: str, recipe: Recipe) -> list[Run]:
    return plan.runs(part, recipe, probes=(along_the_gradient,))


_Quantity: TypeAlias = Callable[[Result], list[float]]
_Looks: TypeAlias = Callable[[Result, Plan, Probe, Sequence[float]], list[float]]

_MEASURES: dict[str, _Quantity] = {
    "range of the loss": variations,
    "range, share of the loss": shares,
    "change of the gradient, share": changes,
    "effective smoothness": smoothness,
}


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare how the loss and its gradient change along the gradient."""
    effects, last, rows = {}, {}, []
    for what, quantity in _MEASURES.items():
        for when, looks in (("before it learns", before), ("learning", learning)):

            def average(result: Result, of: _Quantity = quantity, looks: _Looks = looks) -> float:
                return geometric(looks(result, plan, along_the_gradient, of(result)))

            plain, ours = (each(store, _runs(plan, part, recipe), average) for recipe in _RECIPES)
            effect = ratio(ours, plain)
            rows += [
                Row(f"plain, {when}", what, plain),
                Row(f"batchnorm, {when}", what, ours, effect),
            ]
        effects[what], last[what] = effect, (geometric(plain), geometric(ours))
    by_loss, by_gradient = effects["range of the loss"], effects["change of the gradient, share"]
    without, with_ = last["change of the gradient, share"]
    return Finding(
        part,
        f"Once it learns, along the gradient the loss of the {part} network ranges {by_loss} as "
        f"far with batch normalization as without it, and the gradient changes {by_gradient} as "
        f"much: by {with_:.2f} of its length in place of {without:.2f}.",
        str(by_gradient),
        short(without),
        short(with_),
        {
            "the loss varies less along the gradient": by_loss.high < 1,
            "the gradient changes less along itself": by_gradient.high < 1,
        },
        rows,
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the losses along the gradient, and the change of the gradient."""
    return [
        Chart(
            "along-the-gradient",
            "The loss of a batch before a step, and from the lowest to the highest that it has up "
            "to four steps along the gradient: one run of each network.",
            [_losses(plan, part, store) for part in parts],
        ),
        Chart(
            "gradient-change",
            "How much the gradient changes along itself, as a share of its length: in training, "
            "over all lengths of a step, and by the length. Lines are medians over the seeds, "
            "bands reach from the lowest to the highest.",
            [
                panel
                for part in parts
                for panel in (_in_training(plan, part, store), _by_length(plan, part, store))
            ],
        ),
    ]


def _losses(plan: Plan, part: str, store: Store) -> Panel:
    lines = []
    for recipe in _RECIPES:
        result = store[_runs(plan, part, recipe)[0]]
        losses = [seen["losses"] for seen in result.seen(along_the_gradient)]
        low, high = ([end(along) for along in losses] for end in (min, max))
        lines.append(
            Series(
                recipe.norm,
                coming(result, along_the_gradient),
                [along[0] for along in losses],
                low,
                high,
            )
        )
    axis = reaching("loss along the gradient", ends(lines), log=True)
    return Panel(
        f"{part}, rate {plan.networks[part].usual_rate:g}", coming_axis(plan, part), axis, lines
    )


def _in_training(plan: Plan, part: str, store: Store) -> Panel:
    lines = []
    for recipe in _RECIPES:
        results = [store[run] for run in _runs(plan, part, recipe)]
        lines.append(
            curve(recipe.norm, coming(results[0], along_the_gradient), list(map(changes, results)))
        )
    axis = reaching("change, share of the gradient", ends(lines), log=True)
    return Panel(f"{part}, in training", coming_axis(plan, part), axis, lines)


def _by_length(plan: Plan, part: str, store: Store) -> Panel:
    lines = []
    for recipe in _RECIPES:
        runs = [store[run].seen(along_the_gradient) for run in _runs(plan, part, recipe)]
        means = [
            list(map(geometric, zip(*(seen["changes"] for seen in looks), strict=True)))
            for looks in runs
        ]
        lines.append(curve(recipe.norm, LENGTHS, means))
    ticks = list(zip(LENGTHS, ("¼", "½", "1", "2", "4"), strict=True))
    return Panel(
        f"{part}, by length",
        Axis("length of the step, × rate", LENGTHS[0], LENGTHS[-1], log=True, ticks=ticks),
        reaching("change, share of the gradient", ends(lines), start=0),
        lines,
    )


CLAIM = Claim(
    number=12,
    name="landscape",
    title="A smoother loss for the next layer",
    says="Batch normalization fixes the scale and the place of what the next layer gets, and with "
    "them the geometry of the loss as a function of its W and b. Santurkar et al. (2018, "
    "arXiv:1805.11604) hold that it makes the loss smoother and its gradients more predictive; "
    "Ghorbani et al. (2019, arXiv:1901.10159) found that it takes the few very large eigenvalues "
    "from the Hessian. Against it, Yao et al. (2019, arXiv:1912.07145) found from the "
    "Hessian that it need not make the loss smoother, above all of shallow networks. A comparison "
    "also depends on the scale of the weights: behind batch normalization only their direction "
    "counts, so the same rate is a shorter or longer step there (Hoffer et al. 2018, "
    "arXiv:1803.01814). And on the plateau where plain sigmoids begin, everything is smooth, and "
    "nothing is learned.",
    source="Santurkar et al. 2018 (arXiv:1805.11604), section 3.1; figure 4",
    measured="Both networks train with the network's usual rate, on batches of 60. At steps "
    "whose numbers grow by a factor of 1.5, from the first to the last, a copy goes along the "
    "negative gradient of the next batch, by ¼, ½, 1, 2 and 4 times the learning rate. On the same "
    "batch we take the range from the lowest to the highest loss, here and there, and the "
    "length of the gradient's change as a share of the gradient's length. Each is averaged "
    "geometrically, over the lengths, and over the looks before and after the loss of a batch "
    f"first falls below {LEARNING:.0%} of the first one, and of the loss of guessing, for "
    "each run by itself: on a plateau, as plain sigmoids have it for hundreds of steps, the loss "
    "is flat whatever it is later. The "
    "effective smoothness is the largest change of the gradient per length moved. A loss that "
    "falls further ranges further, too; the range as a share of the loss is told beside it. The "
    "lengths are in units of the learning rate, not of the weights, whose scale does not mean "
    "the same with batch normalization.",
    rule="It holds for a network if the 95% intervals of two ratios to the plain network, over the "
    "seeds, are below\u00a01: of the range of the loss, and of the change of the gradient, at the "
    "looks after learning began.",
    unit="change of the gradient",
    parts=("relu", "sigmoid", "conv", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
