"""A whole bench of models, from what was asked for to the files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from batchnorm.bench.conduct import say_if_busy, shown_on
from batchnorm.bench.errors import BenchError
from batchnorm.bench.harness import LEAST_ROUNDS
from batchnorm.bench.save import check_folder, save
from batchnorm.environment import describe
from benchmarks.models.measure import Case, Limits, Taken, layers, measure
from benchmarks.models.networks import FORMATS, NETWORKS, pose
from benchmarks.models.picture import png
from benchmarks.models.rows import Row, rows
from benchmarks.models.tables import terminal
from benchmarks.models.ways import MODES, PEERS, RATE

NAME = "models"


class Wanted(NamedTuple):
    """What is to be measured.

    Attributes:
        networks: Their names.
        quick: Whether small ones will do, for a first impression.
        peers: Those of `PEERS` that take part; None for all, on the first network alone.
        steps: How many steps of training are timed, and their losses compared.
        seconds: For how long inference is timed.
        cap: For how long a peer may compile, in seconds.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    quick: bool = False
    peers: tuple[str, ...] | None = None
    steps: int = 20
    seconds: float = 10.0
    cap: float = 300.0


def plan(wanted: Wanted) -> list[Case]:
    """Return the cases: the first network in both layouts, the others in the first layout.

    In the second layout there are only so many steps as the time needs.

    Args:
        wanted: What was asked for.

    Raises:
        BenchError: There is no such network or peer.
    """
    for what, known, asked in (
        ("models", NETWORKS, wanted.networks),
        ("peers", PEERS, wanted.peers or ()),
    ):
        for name in asked:
            if name not in known:
                listed = ", ".join(known)
                raise BenchError(f"--{what}: got {name!r}, expected some of {listed}, with commas")
    first, cases = next(iter(NETWORKS)), []
    for name in dict.fromkeys(wanted.networks):
        network = NETWORKS[name].quick() if wanted.quick else NETWORKS[name]
        for layout in FORMATS if name == first else list(FORMATS)[:1]:
            main = layout == next(iter(FORMATS))
            peers = wanted.peers
            if peers is None:
                peers = tuple(PEERS) if name == first and main and not wanted.quick else ()
            steps = wanted.steps if main else min(wanted.steps, LEAST_ROUNDS)
            cases.append(Case(network, layout, steps, peers if main else (), memory=main))
    return cases


def conduct(wanted: Wanted, folder: Path, *, console: Console) -> list[Row]:
    """Check and time all networks, show the tables, write the files.

    Args:
        wanted: What is to be measured.
        folder: Where the files go.
        console: Where progress and tables are shown.

    Returns:
        All rows.

    Raises:
        BenchError: What was asked for cannot be had.
        WrongResult: A way computes something else than the network.
    """
    import transformers

    check_folder(folder)
    cases = plan(wanted)
    load = say_if_busy(console)
    taken = _measured(cases, Limits(wanted.seconds, wanted.cap), console)
    left_out = {
        f"{name}: {each.case.network.title} {each.case.layout}, {each.mode}": reason
        for each in taken
        for name, reason in each.left_out.items()
    }
    for what, reason in left_out.items():
        console.print(f"{what} is left out: {reason}", markup=False, highlight=False)
    networks = dict.fromkeys(case.network.name for case in cases)
    found = {case.network.name: case.network for case in cases}
    made_on = {
        **describe(),
        "transformers": transformers.__version__,
        "load": round(load, 2),
        "quick": wanted.quick,
        "seconds": wanted.seconds,
        "cap": wanted.cap,
        "rate": RATE,
        "left_out": left_out,
        "layers": {found[name].title: layers(pose(found[name])) for name in networks},
    }
    measured = rows(taken)
    console.print(terminal(measured))
    files = save(folder, measured, made_on, png(measured), NAME)
    console.print(f"All rows: {files[0]}", markup=False, soft_wrap=True, highlight=False)
    return measured


def _measured(cases: list[Case], limits: Limits, console: Console) -> list[Taken]:
    """Measure all cases, and show what is at work."""
    done = []
    with shown_on(console) as progress:
        bar = progress.add_task("", total=len(cases) * len(MODES))
        for taken in measure(
            cases, limits, lambda what: progress.update(bar, description=what, refresh=True)
        ):
            done.append(taken)
            progress.update(bar, advance=1, refresh=True)
    return done
