"""Claim 18: the batch size decides how good the moments are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from batchnorm.study.charts import Axis, Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.descent import evaluate
from batchnorm.study.interval import Interval, difference
from batchnorm.study.measures.drawing import curve, reaching
from batchnorm.study.measures.rates import told_steps
from batchnorm.study.measures.runs import NotMeasured, each, final, learned
from batchnorm.study.observation import Result, State
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, PLAIN, Recipe
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_PARTS = ("relu", "conv", "sigmoid")
_SIZES = (2, 4, 8, 16, 32, 64, 128)
_SMALL, _LARGE = (2, 4, 8), (32, 64, 128)
_LOOKED_AT = 512  # training examples: enough to compare two losses, and quick in batches of 2
_GAP = "|loss by batches − by running|"
_NORMS = ("plain", "batchnorm", "ghost", "renormalized")

_Table = dict[int, list[float]]  # by the batch size: a value for each seed


def loss_of_batches_and_alone(state: State) -> list[float] | None:
    """Return the loss on training examples by the moments of batches, and by running statistics.

    The batches are as large as those of the training, and have groups where those had some.
    """
    if not state.last:
        return None
    model = state.copy()
    size = len(state.batch[1])
    count = min(_LOOKED_AT, len(state.trained[1])) // size * size
    x, y = (values[:count] for values in state.trained)
    alone, _ = evaluate(model, x, y)
    with torch.no_grad():
        losses = [
            cross_entropy(model(inputs), labels).item()
            for inputs, labels in zip(torch.split(x, size), torch.split(y, size), strict=True)
        ]
    together = float(np.mean(losses))
    return [float(np.nan_to_num(loss, nan=1e30, posinf=1e30)) for loss in (together, alone)]


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the runs of all batch sizes."""
    return [run for norm in _NORMS for size in _SIZES for run in _runs(plan, part, norm, size)]


def _runs(plan: Plan, part: str, norm: str, size: int) -> list[Run]:
    """The runs with a batch size; those with ghost batches differ in the size of the groups."""
    recipes = {
        "plain": PLAIN,
        "batchnorm": NORMALIZED,
        # One group is the whole batch.
        "ghost": Recipe("ghost", group=size) if size < max(_SIZES) else NORMALIZED,
        "renormalized": Recipe("renormalized"),
    }
    return plan.runs(
        part,
        recipes[norm],
        steps=max(1, plan.networks[part].steps // 2),
        batch_size=max(_SIZES) if norm == "ghost" else size,
        probes=(loss_of_batches_and_alone,) if norm != "plain" else (),
    )


def _accuracies(plan: Plan, part: str, store: Store, norm: str) -> _Table:
    return {size: [100 * final(store[r]) for r in _runs(plan, part, norm, size)] for size in _SIZES}


def _gaps(plan: Plan, part: str, store: Store, norm: str) -> _Table:
    def gap(result: Result) -> float:
        together, alone = result.seen(loss_of_batches_and_alone)[-1]
        # Without the sign, by which gaps would cancel in a mean; more digits are rounding.
        return round(abs(float(together - alone)), 6)

    return {size: each(store, _runs(plan, part, norm, size), gap) for size in _SIZES}


def _mean(table: _Table, sizes: Sequence[int]) -> list[float]:
    """For each seed, the mean over some batch sizes."""
    return [float(np.mean(of)) for of in zip(*(table[size] for size in sizes), strict=True)]


def _change(table: _Table, unit: str = "") -> Interval:
    """What small batches change, against large ones."""
    return difference(_mean(table, _SMALL), _mean(table, _LARGE), unit)


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare small batches with large ones."""
    ends = {norm: _accuracies(plan, part, store, norm) for norm in _NORMS}
    gaps = {norm: _gaps(plan, part, store, norm) for norm in _NORMS[1:]}
    if not learned(float(np.mean(_mean(ends["batchnorm"], _LARGE))) / 100, plan):
        raise NotMeasured(f"The normalized {part} network learned nothing.")
    lost = {norm: _change(table, " points") for norm, table in ends.items()}
    wider = _change(gaps["batchnorm"])
    small, large = (float(np.mean(_mean(ends["ghost"], sizes))) for sizes in (_SMALL, _LARGE))
    ghost = [f"{np.mean(ends['ghost'][size]):.1f}% in groups of {size}" for size in _SMALL]
    return Finding(
        part,
        f"Where the moments of 2 to 8 examples take the place of those of 32 to 128, in batches of "
        f"{max(_SIZES)} all the same, the {part} network's accuracy changes by {lost['ghost']}: it "
        f"is {', '.join(ghost)}, and {large:.1f}% in the larger ones. In "
        f"batches that are as small themselves it changes by {lost['batchnorm']}, renormalized by "
        f"{lost['renormalized']}, and without normalization by {lost['plain']}. The gap "
        f"between the loss by batch moments and that by running statistics changes by {wider}, "
        f"renormalized by {_change(gaps['renormalized'])}.",
        str(replace(lost["ghost"], unit="")),
        f"{large:.1f}%",
        f"{small:.1f}%",
        {
            "a larger gap in small batches": wider.low > 0,
            "less accurate in small groups": lost["ghost"].high < 0,
        },
        [*_rows("accuracy, %", ends, " points"), *_rows(_GAP, gaps)],
    )


def _rows(measure: str, tables: dict[str, _Table], unit: str = "") -> list[Row]:
    rows = []
    for norm, table in tables.items():
        rows += [Row(f"{norm}, k = {size}", measure, seeds) for size, seeds in table.items()]
        rows.append(Row(f"{norm}, k from 32 on", measure, _mean(table, _LARGE)))
        rows.append(Row(f"{norm}, k up to 8", measure, _mean(table, _SMALL), _change(table, unit)))
    return rows


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw accuracy and gap by the batch size."""
    caption = (
        " by the size k of the batch, or of the groups within batches of "
        f"{max(_SIZES)} (ghost). Lines are medians over the seeds, bands reach from the lowest to "
        "the highest."
    )
    return [
        Chart(
            "batch-size",
            f"Held-out accuracy at the end{caption}",
            [
                _panel(plan, part, store, _accuracies, _NORMS, "held-out accuracy at the end, %")
                for part in parts
            ],
        ),
        Chart(
            "batch-size-gap",
            "How far apart the losses on training examples are when they are normalized by the "
            f"moments of their batch and by running statistics,{caption}",
            [_panel(plan, part, store, _gaps, _NORMS[1:], _GAP) for part in parts],
        ),
    ]


def _panel(
    plan: Plan,
    part: str,
    store: Store,
    quantity: Callable[[Plan, str, Store, str], _Table],
    norms: Sequence[str],
    label: str,
) -> Panel:
    tables = {norm: quantity(plan, part, store, norm) for norm in norms}
    lines = [
        curve(norm, _SIZES, list(zip(*table.values(), strict=True)))
        for norm, table in tables.items()
    ]
    values = [seeds for table in tables.values() for seeds in table.values()]
    ticks = [(size, str(size)) for size in _SIZES]
    x = Axis("k, examples", _SIZES[0], _SIZES[-1], log=True, ticks=ticks)
    return Panel(part, x, reaching(label, values), lines)


CLAIM = Claim(
    number=18,
    name="batch_size",
    title="The batch size decides how good the moments are",
    says="The batch size k, often 32, decides how good the moments are: those of a few examples "
    "are noise. For it: with batches of 2 an ImageNet classifier is many points less accurate (Wu "
    "& He 2018, arXiv:1803.08494), and training and evaluation disagree (Wu & Johnson 2021, "
    "arXiv:2105.07576); renormalization helps (Ioffe 2017, arXiv:1702.03275). Against it as a rule "
    "for large batches: the noise regularizes, and large batches generalize better when they are "
    "normalized in small groups (ghost batches, Hoffer et al. 2017, arXiv:1705.08741); the best "
    "results are often with batches of 32 or fewer, normalized or not (Masters & Luschi 2018, "
    "arXiv:1804.07612).",
    source="lecture notes; Ioffe 2017 (arXiv:1702.03275), section 3",
    measured=f"Networks are trained with batches of k = {', '.join(map(str, _SIZES))} examples at "
    "their usual learning rate, with half of their usual steps, the same number for every k "
    f"({told_steps(_PARTS, 2)}): with batch normalization, with renormalization, and plain, as a "
    "control of what the noise of the gradient does. Renormalization has the paper's schedule, "
    "shortened to a hundredth, as the runs are short: 50 batches as batch normalization, then "
    "limits that widen until batch 250 (d) and 400 (r), so a short run does not see its end. "
    "Ghost batches are the other control: batches of "
    f"{max(_SIZES)}, so always the same examples in a step, normalized in groups of k. Small means "
    "k = 2, 4 and 8, large means 32, 64 and 128, of which we take means for each seed. The "
    "accuracy is that in evaluation on held-out examples, the mean of the last three evaluations. "
    "The gap is how far apart two losses at the end are, without the sign, on up to "
    f"{_LOOKED_AT} training examples: when they are normalized in batches of k, as in training, "
    "and by the running statistics, as in evaluation.",
    rule="It holds for a network if the gap is larger with small batches than with large ones, and "
    "if the network is less accurate with small ghost groups than with large ones, as nothing but "
    "the moments differs there: both with a 95% interval over the seeds above\u00a00.",
    unit="accuracy, groups of 32–128 and of 2–8",
    parts=_PARTS,
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
