"""A whole study, from the name of a data set to the report."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

from joblib import cpu_count
from rich.console import Console

from batchnorm.environment import describe
from batchnorm.study import paper
from batchnorm.study.budget import Chosen, Pace, choose, parts_of, seconds
from batchnorm.study.claims import Claim, all_claims, judge
from batchnorm.study.data import DataSet, load
from batchnorm.study.engine import ENGINES, complete
from batchnorm.study.extend import bring
from batchnorm.study.plan import Plan, plan
from batchnorm.study.report import write
from batchnorm.study.store import Store
from batchnorm.study.story import Story
from batchnorm.study.table import terminal
from batchnorm.study.tasks import StudyError, Task
from batchnorm.study.training import Run


@dataclass(frozen=True)
class Wanted:
    """What a study is asked for.

    Attributes:
        data: The data set, as `load` takes it.
        claims: The numbers or names of claims, with commas; empty for all.
        budget: The time that it may take, as `seconds` takes it.
        paper: Whether the original experiment is repeated, in place of the claims.
        extensions: What the user brings, as `bring` takes it.
        jobs: How many runs are done at a time; by default one on each core.
        engine: What does them: `joblib`, `dask` or `ray`.
        address: Where Dask's scheduler or Ray's head is; by default one is started here.
        tensorboard: Whether TensorBoard's event files are written.
    """

    data: str = "digits"
    claims: str = ""
    budget: str = "3m"
    paper: bool = False
    extensions: Sequence[str] = ()
    jobs: int | None = None
    engine: str = "joblib"
    address: str | None = None
    tensorboard: bool = False

    def command(self) -> list[str]:
        """Return the command that does a study of the same data."""
        extensions = [word for place in self.extensions for word in ("--extend", place)]
        return ["batchnorm", "study", "--data", self.data, *extensions, *["--paper"] * self.paper]

    def rest(self) -> list[str]:
        """Return what the command must have besides to do the same claims in the same time."""
        claims = ["--claims", self.claims] if self.claims else []
        return [] if self.paper else [*claims, "--budget", self.budget]


def conduct(wanted: Wanted, folder: Path, *, console: Console) -> None:
    """Do what is missing, judge the claims, show the table and write the report.

    Args:
        wanted: What is asked for.
        folder: Where the outcomes are kept and the report goes.
        console: Where progress and table are shown.

    Raises:
        DataError: Something is wrong with the data.
        StudyError: Something else that was asked for cannot be, or the folder cannot be used.
    """
    if wanted.engine not in ENGINES:
        raise StudyError(f"--engine {wanted.engine}: expected one of {', '.join(ENGINES)}")
    brought = bring(wanted.extensions)
    known = [*all_claims(), *brought.claims]
    claims = _claims(wanted, known)
    budget = seconds(wanted.budget)
    data_set = load(wanted.data, brought.forms)
    made_on = describe()
    outline = plan(data_set, brought.networks)
    with Store(folder, machine=made_on["cpu"]) as store:
        paces = _Paces(outline, data_set, store, console)
        if wanted.paper or isinf(budget):
            chosen = [Chosen(claim, parts_of(claim, outline)) for claim in claims]
        else:
            jobs = min(wanted.jobs or cpu_count(), cpu_count())
            chosen = choose(claims, outline, paces, budget, jobs, store)
        tasks = list(dict.fromkeys(task for each in chosen for task in each.tasks(outline)))
        complete(
            _with_all_probes(tasks, known, outline),
            data_set,
            store,
            console=console,
            jobs=wanted.jobs,
            engine=wanted.engine,
            address=wanted.address,
            events=folder / "tensorboard" if wanted.tensorboard else None,
        )
        story = Story(
            data_set.name,
            [judge(each.claim, each.parts, outline, store, each.left_out) for each in chosen],
            lead=_lead(data_set, tasks),
            broken_off={str(task): store[task].reason for task in tasks if store[task].reason},
            made_on={**made_on, "cpu": ", ".join({store.machine(task): None for task in tasks})},
            command=wanted.command(),
            whole=[*wanted.rest(), "--out", str(folder)],
        )
    report = write(folder, story)
    console.print(terminal(story))
    console.print(f"The whole story, with pictures: {report}", markup=False, soft_wrap=True)


def _with_all_probes(
    tasks: Sequence[Task[Any]], known: Sequence[Claim], outline: Plan
) -> list[Task[Any]]:
    """Let each run be looked at by all claims, so that none has to be done again for another."""
    whole = {task: task for task in tasks}
    for claim in known:
        for part in parts_of(claim, outline):
            for task in claim.tasks(outline, part):
                if task in whole:
                    whole[task] = whole[task].united(task)
    return list(whole.values())


class _Paces(Mapping[str, float]):
    """The seconds of a step of each network, measured when they are first asked for, and kept."""

    def __init__(self, outline: Plan, data_set: DataSet, store: Store, console: Console) -> None:
        self._outline, self._data_set = outline, data_set
        self._store, self._console = store, console

    def __getitem__(self, network: str) -> float:
        pace = Pace(self._outline.data, self._outline.networks[network])
        complete([pace], self._data_set, self._store, console=self._console)
        return self._store[pace].step

    def __iter__(self) -> Iterator[str]:
        return iter(self._outline.networks)

    def __len__(self) -> int:
        return len(self._outline.networks)


def _claims(wanted: Wanted, known: Sequence[Claim]) -> list[Claim]:
    """Return the claims that were asked for, in the order of the report."""
    if wanted.paper:
        if wanted.claims:
            raise StudyError("--paper repeats one experiment: leave --claims out")
        return [paper.CLAIM]
    keys = [key.strip() for key in wanted.claims.split(",") if key.strip()]
    names = {name: claim for claim in known for name in (claim.key, claim.name)}
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            way_out = f"did you mean {near[0]}?" if near else "name some of these"
            raise StudyError(
                f"--claims {key}: no such claim, expected numbers or names of "
                f"{', '.join(claim.key for claim in known)}; {way_out}"
            )
    asked = {names[key].name for key in keys}
    return [claim for claim in known if not asked or claim.name in asked]


def _lead(data_set: DataSet, tasks: Sequence[Task[Any]]) -> str:
    runs = [task for task in tasks if isinstance(task, Run)]
    networks = dict.fromkeys(run.network.name for run in runs)
    channels, height, width = data_set.shape
    return (
        f"Networks ({', '.join(networks) or 'none'}) were trained {len(runs)} times, with and "
        f"without batch normalization, on up to {len(data_set.train_labels)} examples of "
        f"{channels}×{height}×{width} values in {data_set.classes} classes, and tried on "
        f"{len(data_set.test_labels)} that they had never seen."
    )
