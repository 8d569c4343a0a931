"""A whole study, from the name of a data set to the report."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from batchnorm.environment import describe
from batchnorm.study.claims import CLAIMS, judge
from batchnorm.study.data import DataSet, load
from batchnorm.study.engine import complete
from batchnorm.study.plan import Plan, plan
from batchnorm.study.report import write
from batchnorm.study.store import Store
from batchnorm.study.story import Story
from batchnorm.study.table import terminal


def conduct(
    spec: str, folder: Path, *, console: Console, quick: bool = False, jobs: int | None = None
) -> None:
    """Do what is missing, judge the claims, show the table and write the report.

    Args:
        spec: The data set, as `load` takes it.
        folder: Where the outcomes are kept and the report goes.
        console: Where progress and table are shown.
        quick: Whether a first impression will do.
        jobs: How many runs are done at a time; by default one on each core.

    Raises:
        DataError: Something is wrong with the data.
        StudyError: The folder cannot be used, or a worker process was lost.
    """
    data_set = load(spec)
    made_on = describe()
    outline = plan(data_set, quick=quick)
    tasks = [task for claim in CLAIMS for task in claim.tasks(outline)]
    with Store(folder, machine=made_on["cpu"]) as store:
        complete(tasks, data_set, store, console=console, jobs=jobs)
        story = Story(
            data_set.name,
            judge(outline, store),
            lead=_lead(data_set, outline),
            broken_off={str(task): store[task].reason for task in tasks if store[task].reason},
            made_on={**made_on, "cpu": ", ".join({store.machine(task): None for task in tasks})},
            command=shlex.join(["batchnorm", "study", "--data", spec] + ["--quick"] * quick),
        )
        report = write(folder, story)
    console.print(terminal(story))
    console.print(f"The whole story, with pictures: {report}", markup=False, soft_wrap=True)


def _lead(data_set: DataSet, outline: Plan) -> str:
    channels, height, width = data_set.shape
    return (
        f"{len(outline.grid())} networks were trained on {len(data_set.train_labels)} examples of "
        f"{channels}×{height}×{width} values in {data_set.classes} classes, and tried on "
        f"{len(data_set.test_labels)} that they had never seen: a dense one with sigmoids and a "
        "convolutional one with ReLU, each without batch normalization, with torch.nn’s, and with "
        f"batchnorm’s, from {len(outline.seeds)} seeds, at several learning rates."
    )
