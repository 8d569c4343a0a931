"""Shifts, and what can be done about each: `batchnorm study shifts`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from batchnorm.environment import describe
from batchnorm.models.files import whole as whole_file
from batchnorm.study.data import load
from batchnorm.study.engine import complete
from batchnorm.study.markdown import rows
from batchnorm.study.measures.covariate_shift import Seen, seen, shifted_and_adapted
from batchnorm.study.measures.retraining import Shifted
from batchnorm.study.measures.runs import final, whole
from batchnorm.study.plan import plan
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.shifts import SEVERITIES, SHIFTS, applies
from batchnorm.study.store import Store
from batchnorm.study.tasks import StudyError
from batchnorm.study.training import Run


@dataclass(frozen=True)
class Outcome:
    """What shifts did to networks of one kind, and what was done about it.

    Attributes:
        network: The name of the network.
        data: The name of the data set.
        seen: What was seen of the trained ones.
        retrained: By shift, severity and seed: the accuracy of one that was trained on shifted
            examples, in percent.
    """

    network: str
    data: str
    seen: Seen
    retrained: NDArray[np.float64]


def conduct(
    data: str,
    network: str,
    folder: Path,
    *,
    jobs: int | None = None,
    console: Console,
) -> str:
    """Train, shift, adapt and retrain; write `shifts.md` and `shifts.png`, and return the table.

    Args:
        data: The data set, as `load` takes it.
        network: The name of a network of the study.
        folder: Where outcomes are kept, and table and picture go.
        jobs: How many runs are done at a time; by default one on each core.
        console: Where progress is shown.

    Raises:
        DataError: Something is wrong with the data.
        StudyError: There is no such network, a run broke off, or the folder cannot be used.
    """
    data_set = load(data)
    outline = plan(data_set)
    if network not in outline.networks:
        raise StudyError(
            f"--network {network}: expected one of {', '.join(outline.networks)}; name one of these"
        )
    names = [name for name in SHIFTS if applies(name, data_set.shape)]
    trained = outline.runs(network, NORMALIZED, probes=(shifted_and_adapted,))
    retrained = {
        (name, severity): outline.runs(network, NORMALIZED, treatment=Shifted(name, severity))
        for name in names
        for severity in SEVERITIES
    }
    with Store(folder, machine=describe()["cpu"]) as store:
        tasks = [*trained, *(run for runs in retrained.values() for run in runs)]
        complete(tasks, data_set, store, console=console, jobs=jobs)
        for task in tasks:
            if store[task].reason:
                raise StudyError(f"a run broke off ({task}): {store[task].reason}")
        outcome = Outcome(
            network,
            data_set.name,
            seen(whole(store, trained)),
            _accuracies(store, retrained, names),
        )
    table = markdown(outcome)
    for name, content in (("shifts.md", f"{table}\n".encode()), ("shifts.png", png(outcome))):
        with whole_file(folder / name) as partial:
            partial.write_bytes(content)
    return table


def _accuracies(
    store: Store, runs: dict[tuple[str, int], list[Run]], names: Sequence[str]
) -> NDArray[np.float64]:
    return np.array(
        [
            [
                [100 * final(result) for result in whole(store, runs[name, severity])]
                for severity in SEVERITIES
            ]
            for name in names
        ]
    )


def markdown(outcome: Outcome) -> str:
    """Return a table: a line for each shift and severity.

    Args:
        outcome: What was seen.
    """
    of = outcome.seen
    before, _, score, flagged = of.clean
    seeds = len(before)
    told = [("none", "", _score(score), _share(flagged), _percent(before), "", "")]
    for name, looks, retrained in zip(of.names, of.looks, outcome.retrained, strict=True):
        for severity, look, again in zip(SEVERITIES, looks, retrained, strict=True):
            accuracy, adapted, score, flagged = look
            told.append(
                (
                    name,
                    str(severity),
                    _score(score),
                    _share(flagged),
                    _percent(accuracy),
                    _percent(adapted),
                    _percent(again),
                )
            )
    headings = ("shift", "severity", "score", "flagged", "as it is", "adapted", "retrained")
    lead = (
        f"The {outcome.network} network on {outcome.data}, means over {seeds} seeds: the score in "
        f"nats, the share of seeds for which it is flagged, and the held-out accuracy, in percent. "
        f"Of clean samples {100 * float(of.alarms.mean()):.1f}% are flagged."
    )
    return f"{lead}\n\n{rows(headings, told, 'lrrrrrr')}"


def _score(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.3g}"


def _share(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.0%}"


def _percent(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.1f}"


def png(outcome: Outcome) -> bytes:
    """Draw the accuracies by severity, a panel for each shift.

    Args:
        outcome: What was seen.
    """
    of = outcome.seen
    columns = 3
    lines = -(-len(of.names) // columns)
    figure = Figure(figsize=(7.2, 0.5 + 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel, name, looks, retrained in zip(
        panels, of.names, of.looks, outcome.retrained, strict=False
    ):
        for values, label, color in (
            (retrained, "retrained, with labels", "#7f8c99"),
            (looks[:, 1], "adapted, without", "#2a7f62"),
            (looks[:, 0], "as it is", "#c4402f"),
        ):
            panel.plot(SEVERITIES, values.mean(-1), "o-", label=label, color=color, markersize=3)
        panel.axhline(float(of.clean[0].mean()), color="black", linewidth=0.6, linestyle=":")
        panel.set_title(name, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels)[len(of.names) :]:
        panel.set_visible(False)
    figure.supxlabel("severity", fontsize=9)
    figure.supylabel("held-out accuracy, %", fontsize=9)
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()
