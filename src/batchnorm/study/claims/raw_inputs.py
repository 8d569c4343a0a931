"""Claim 10: no separate standardization layer is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchnorm.study.charts import Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.rates import at_own_rate, few_rates
from batchnorm.study.measures.runs import NotMeasured, final, learned
from batchnorm.study.measures.treatments import badly_scaled, standardized
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_STEPS = 250  # or all of a shorter run
_MARGIN = 2.0  # points: less does not count as a difference
_SMALL = (1e-4, 1e-3, 1e-2, 0.1, 1)  # what raw inputs need of the usual rate
_FIRST = Recipe("batchnorm", first=True)


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs of each network on raw and on standardized inputs, with a few rates."""
    return [run for rates in _runs(plan, part).values() for runs in rates for run in runs]


def _runs(plan: Plan, part: str) -> dict[str, list[list[Run]]]:
    """Return by condition, for each learning rate, the runs that differ by the seed alone."""
    network = plan.networks[part]
    small = [factor * network.usual_rate for factor in _SMALL]
    steps = min(_STEPS, network.steps)
    return {
        name: [
            plan.runs(part, recipe, rate, steps=steps, treatment=treatment)
            for rate in (few_rates(plan, part) if scaled else small)
        ]
        for name, recipe, treatment, scaled in (
            ("plain, raw", PLAIN, badly_scaled, False),
            ("plain, standardized", PLAIN, standardized, True),
            ("batchnorm, raw", NORMALIZED, badly_scaled, False),
            ("batchnorm, standardized", NORMALIZED, standardized, True),
            ("batchnorm first, raw", _FIRST, badly_scaled, True),
        )
    }


def _best(plan: Plan, part: str, store: Store) -> dict[str, tuple[float, list[float]]]:
    """Return for each condition its best rate, and the accuracy of each seed with it."""
    best = {name: at_own_rate(store, rates) for name, rates in _runs(plan, part).items()}
    return {
        name: (runs[0].learning_rate, [100 * final(store[run]) for run in runs])
        for name, runs in best.items()
    }


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare the accuracies at the end."""
    best = _best(plan, part, store)
    ends = {name: accuracies for name, (_, accuracies) in best.items()}
    first = ends["batchnorm first, raw"]
    means = {name: float(np.mean(of)) for name, of in ends.items()}
    if not learned(max(means.values()) / 100, plan):
        raise NotMeasured(f"The {part} network learned nothing from any inputs.")
    kept = difference(first, ends["batchnorm, standardized"], " points")
    won = difference(first, ends["plain, raw"], " points")
    return Finding(
        part,
        f"On raw features the {part} network ends at {means['plain, raw']:.1f}% without "
        f"normalization, and at {means['batchnorm first, raw']:.1f}% when batch normalization "
        f"comes first, against {means['batchnorm, standardized']:.1f}% of the same network on "
        f"standardized features. With batch normalization behind the linear maps alone it ends on "
        f"raw features at {means['batchnorm, raw']:.1f}%.",
        f"{kept.value:+.1f} ({kept.low:+.1f} to {kept.high:+.1f})",
        f"{means['batchnorm, standardized']:.1f}%",
        f"{means['batchnorm first, raw']:.1f}%",
        {
            "no worse than with standardized inputs": kept.low > -_MARGIN,
            "better than plain on raw inputs": won.low > _MARGIN,
        },
        [
            Row(
                name,
                f"held-out accuracy at the end, %, rate {rate:g}",
                of,
                difference(of, first, " points") if of is not first else None,
            )
            for name, (rate, of) in best.items()
        ],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the accuracies."""
    caption = (
        "Held-out accuracy at the end, each condition with the best of its rates. Each dot is a "
        "seed, the bars are the medians. Raw features have scales from 0.1 to 1000."
    )
    return [Chart("raw-inputs", caption, [_panel(plan, part, store) for part in parts])]


def _panel(plan: Plan, part: str, store: Store) -> Panel:
    best = _best(plan, part, store)
    values = {name: of for name, (_, of) in best.items()}
    styles = ["plain" if name.startswith("plain") else "batchnorm" for name in best]
    label = "held-out accuracy at the end, %"
    return beside(part, label, values, styles=styles, start=0, end=102)


CLAIM = Claim(
    number=10,
    name="raw_inputs",
    title="No separate standardization",
    says="With batch normalization as its first layer, a network needs no inputs that were "
    "standardized before: the layer does it. Against it: a batch tells the moments less exactly "
    "than the training set does, and ε counts where a feature's variance is small, as it does not "
    "in a standardization: a feature whose variance in a batch is not far above ε = 1e-5 does not "
    "get the variance 1, and one that is constant in training is divided by √ε, which makes "
    "whatever it is in use 300 times as large. And the layer must come first: normalization behind "
    "the first linear map sees sums in which the features of the largest scales have hidden the "
    "others.",
    source="lecture notes; Géron 2019, Hands-On Machine Learning, chapter 11; on standardization, "
    "LeCun, Bottou, Orr & Müller 1998, Efficient BackProp",
    measured="Each value of an example becomes a feature, is multiplied by 10 to a power drawn "
    "uniformly from −1 to 3, and moved by up to 3 times that, by one draw for all seeds. Networks "
    f"are trained for {_STEPS} steps of 60 examples (or all of a shorter run): plain, with batch "
    "normalization behind each linear map but the last, and with it on the inputs, too; on these "
    "raw features, and on the same standardized with the mean and the standard deviation of the "
    "training examples, where features that are constant become 0. Each has the best of its "
    "rates: on raw features without normalization first 1e-4, 1e-3, 0.01, 0.1 and 1 times the "
    "network's usual rate, as such features need small ones, the others the usual rate and the "
    "next two of the network's grid. What counts is the mean held-out accuracy of the last three "
    "evaluations. In the table of numbers, differences are to normalization first.",
    rule="It holds for a network if normalization first on raw features is no more than "
    f"{_MARGIN:g} points below the same network without it on standardized features, and more than "
    f"{_MARGIN:g} points above the plain network on raw features, with the whole 95% interval over "
    "the seeds.",
    unit="accuracy at the end: standardized, raw with normalization first",
    parts=("relu", "sigmoid"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
