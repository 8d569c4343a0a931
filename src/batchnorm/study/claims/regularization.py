"""Claim 6: batch normalization regularizes, lessens the need of dropout, and generalizes better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from batchnorm.study.charts import Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.rates import at_own_rate, tried
from batchnorm.study.measures.runs import NotMeasured, each, final, learned
from batchnorm.study.observation import Result
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_EXAMPLES = 500  # few enough that all networks learn them by heart
_RECIPES = {
    "plain": PLAIN,
    "dropout": replace(PLAIN, dropout="after"),
    "batchnorm": NORMALIZED,
    "norm, dropout": replace(NORMALIZED, dropout="after"),
    "dropout, norm": replace(NORMALIZED, dropout="before"),
}
_BOTH = ("norm, dropout", "dropout, norm")
_STYLES = ("plain", "dropout", "batchnorm", "both", "both")


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs on few examples, of every variant with a few rates."""
    return [run for name in _RECIPES for runs in _tried(plan, part, name) for run in runs]


def _tried(plan: Plan, part: str, name: str) -> list[list[Run]]:
    return tried(plan, part, _RECIPES[name], _EXAMPLES)


def _chosen(plan: Plan, part: str, store: Store) -> dict[str, Sequence[Run]]:
    """The runs of every variant, with the rate that suits it best."""
    return {name: at_own_rate(store, _tried(plan, part, name)) for name in _RECIPES}


def _accuracy(result: Result) -> float:
    return 100 * final(result)


def _gap(result: Result) -> float:
    """Both accuracies are those at the end: a mean of earlier ones would widen the gap."""
    return 100 * (result.train_accuracy - result.accuracies[-1])


def _loss_gap(result: Result) -> float:
    return result.test_loss - result.train_loss


def _values(
    plan: Plan, part: str, store: Store, quantity: Callable[[Result], float]
) -> dict[str, list[float]]:
    chosen = _chosen(plan, part, store)
    return {name: each(store, runs, quantity) for name, runs in chosen.items()}


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare the gaps between training and held-out examples."""
    accuracies = _values(plan, part, store, _accuracy)
    if not learned(float(np.mean(accuracies["plain"])) / 100, plan):
        raise NotMeasured(f"The plain {part} network learned nothing.")
    gaps, loss_gaps = (_values(plan, part, store, of) for of in (_gap, _loss_gap))
    gap = difference(loss_gaps["batchnorm"], loss_gaps["plain"])
    accuracy = difference(accuracies["batchnorm"], accuracies["plain"], " points")
    rate = _chosen(plan, part, store)["plain"][0].learning_rate
    at_plains = each(store, plan.runs(part, NORMALIZED, rate, examples=_EXAMPLES), _loss_gap)
    gap_at_plains = difference(at_plains, loss_gaps["plain"])
    both = max(_BOTH, key=lambda order: float(np.mean(accuracies[order])))
    added = np.subtract(accuracies[both], accuracies["batchnorm"]).tolist()
    added_to_plain = np.subtract(accuracies["dropout"], accuracies["plain"]).tolist()
    less = difference(added, added_to_plain, " points")
    without, with_ = (float(np.mean(loss_gaps[name])) for name in ("plain", "batchnorm"))
    rows = []
    for measure, values, unit in (
        ("held-out accuracy, %", accuracies, " points"),
        ("train-test gap of the loss", loss_gaps, ""),
        ("train-test gap, points", gaps, " points"),
    ):
        for name, of in values.items():
            effect = difference(of, values["plain"], unit) if name != "plain" else None
            rows.append(Row(name, measure, of, effect))
    return Finding(
        part,
        f"Trained on few examples, the plain {part} network has a loss on held-out examples that "
        f"is {without:.3g} above that on those, the normalized one {with_:.3g}: a change of {gap}, "
        f"and of {gap_at_plains} with the plain network's learning rate, {rate:g}. The held-out "
        f"accuracy changes by {accuracy}. Dropout adds {np.mean(added_to_plain):+.2f} points to it "
        f"without normalization and {np.mean(added):+.2f} with it ({both}): a difference of "
        f"{less}.",
        str(gap),
        f"{without:.3g}",
        f"{with_:.3g}",
        {
            "a smaller gap of the loss": gap.high < 0,
            "a smaller gap at the plain network's rate": gap_at_plains.high < 0,
            "a higher held-out accuracy": accuracy.low > 0,
            "dropout adds less to it than without": less.high < 0,
        },
        [
            *rows,
            Row(
                f"batchnorm, rate {rate:g}", "train-test gap of the loss", at_plains, gap_at_plains
            ),
            Row("dropout without", "points that dropout adds", added_to_plain),
            Row("dropout with", "points that dropout adds", added, less),
        ],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the gaps and the accuracies."""
    caption = (
        "{} of networks trained on few examples: plain, with dropout, with batch normalization, "
        "and with both, dropout last or first. Each dot is a seed, the bars are medians."
    )

    def panels(quantity: Callable[[Result], float], label: str) -> list[Panel]:
        return [
            beside(part, label, _values(plan, part, store, quantity), styles=_STYLES)
            for part in parts
        ]

    return [
        Chart(
            "generalization-gap",
            caption.format("Loss on held-out examples less that on the training ones, at the end,"),
            panels(_loss_gap, "train-test gap of the loss"),
        ),
        Chart(
            "generalization",
            caption.format("Held-out accuracy at the end,"),
            panels(_accuracy, "held-out accuracy at the end, %"),
        ),
    ]


CLAIM = Claim(
    number=6,
    name="regularization",
    title="A regularizer, and less need of dropout",
    says="Batch normalization acts as a regularizer, so there is less need of dropout, and "
    "networks generalize better: an example is seen with ever other ones in its batch, whose "
    "moments are noise to it. For it: Luo et al. (2018, arXiv:1809.00846) find a decay of gamma "
    "in that noise, and Bjorck et al. (2018, arXiv:1806.02375) better generalization through the "
    "higher learning rates. Dropout beside it can do harm: it shifts the variance from training "
    "to evaluation (Li et al. 2018, arXiv:1801.05134). Against it: the noise fades with larger "
    "batches (Hoffer et al. 2017, arXiv:1705.08741); weight decay no longer regularizes "
    "normalized weights, it only changes their effective learning rate (van Laarhoven 2017, "
    "arXiv:1706.05350); and with enough regularization of other kinds, networks generalize as "
    "well without (Fixup, Zhang et al. 2019, arXiv:1901.09321).",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.4",
    measured=f"Networks are trained on {_EXAMPLES} examples, or all where there are fewer, which "
    "they can learn by heart: plain, with dropout of 30% behind each activation, with batch "
    "normalization, and with both, dropout behind the activation or before normalization. Each is "
    "tried with three learning rates, the network's usual one and the two above it in its grid, "
    "and keeps the one with which it ends most accurate on held-out examples, on the mean of the "
    "last three evaluations and over the seeds. The gap is the loss on held-out examples less that "
    "on the training examples, both in evaluation at the end; where all know the training examples "
    "by heart, the gap of the accuracy would only be the held-out accuracy once more, so it is "
    "told, but no part of the verdict. What dropout adds is the accuracy with it less that "
    "without, to a plain network, and to a normalized one in the better of the two orders.",
    rule="It holds for a network if with batch normalization the gap of the loss is smaller than "
    "without anything; smaller as well with the plain network's learning rate, so that it is not "
    "the higher rate alone; if the held-out accuracy is higher; and if dropout adds less to the "
    "accuracy than it does without normalization: each with a 95% interval over the seeds on that "
    "side of\u00a00.",
    unit="train-test gap of the loss",
    parts=("relu", "conv", "residual", "sigmoid"),
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
