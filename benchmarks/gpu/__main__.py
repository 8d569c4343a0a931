"""Measure the layers and a training step of ResNet-50 on a GPU: `make bench-gpu`.

The results go to benchmarks/results, and their summary into README.md and docs/bench.md. Where a
run has to end early, `--minutes` ends it and `--resume` goes on with it; `--tables` writes the
summary of what several runs have left in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from batchnorm.bench.cases import DTYPES, _some_of
from batchnorm.bench.errors import BenchError
from batchnorm.bench.save import put
from batchnorm.kernels.triton import tuning
from benchmarks.gpu.cases import DEFAULT_DTYPES
from benchmarks.gpu.conduct import Bench
from benchmarks.gpu.contenders import PEERS
from benchmarks.gpu.figures import figures
from benchmarks.gpu.tables import figures_table, markdown
from benchmarks.gpu.wanted import MODELS, Outcome, Wanted
from benchmarks.models.measure import ROOT

BEGIN, END = "<!-- gpu table: written by `make bench-gpu` -->", "<!-- end of gpu table -->"
FIGURES = "<!-- gpu figures: written by `make bench-gpu` -->", "<!-- end of gpu figures -->"
RESULTS = Path("benchmarks") / "results"


def write_tables(root: Path = ROOT) -> bool:
    """Write what was measured on each GPU into README.md and docs/bench.md.

    Args:
        root: The folder of README.md, docs/ and benchmarks/.

    Returns:
        Whether there was anything to write; else both are left alone.
    """
    folder = root / RESULTS
    parts, short = [], []
    for path in sorted(folder.glob("gpu-*.json")):
        made_on = json.loads(path.read_text(encoding="utf-8"))
        name = path.stem.removesuffix(MODELS)
        is_second = name != path.stem and (folder / f"{name}.json").exists()
        if made_on["device"] != "cuda" or made_on["quick"] or is_second:
            continue
        found = Outcome.found(folder, name)
        picture = f"{RESULTS.as_posix()}/{name}.png"
        parts.append(markdown(made_on, found.rows, found.models, picture))
        short.append(f"{made_on['gpu']}:\n\n{figures_table(figures(found.rows, found.models))}")
    if not parts:
        return False
    put(root / "README.md", BEGIN, "\n\n".join(parts), END)
    put(root / "docs" / "bench.md", FIGURES[0], "\n\n".join(short), FIGURES[1])
    return True


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Do what a command line asks for, and return the exit status.

    That is 1 where a contender was wrong or could not be timed, and 2 where nothing can be
    measured.

    Args:
        arguments: Of the command line; by default those of this process.
        root: The folder of README.md, docs/ and benchmarks/.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few small layers and few rounds")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu is quick, and for trying it"
    )
    parser.add_argument(
        "--dtypes",
        default=",".join(DEFAULT_DTYPES),
        help="by default %(default)s; the figures are about the first",
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="by default %(default)s")
    parser.add_argument("--no-layers", action="store_true", help="measure the training step alone")
    parser.add_argument("--no-models", action="store_true", help="measure the layers alone")
    parser.add_argument("--no-tune", action="store_true", help="cut batches as is reckoned")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    parser.add_argument("--resume", action="store_true", help="keep what --out has already")
    parser.add_argument("--out", type=Path, help="another folder; README.md is left alone then")
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the tables")
    given = parser.parse_args(arguments)
    if given.tables:
        if not write_tables(root):
            return _refuse(f"there are no results of a GPU in {root / RESULTS}")
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        return _refuse(
            "there is no GPU here that torch can use: run it where there is one, or try it with "
            "--device cpu"
        )
    if given.device == "cuda" and not given.no_tune:
        os.environ.setdefault(tuning.VARIABLE, "1")  # the first call of a shape, which is checked
    try:
        wanted = _wanted(given, root)
        outcome = Bench(wanted, Console()).run()
    except BenchError as error:
        return _refuse(str(error))
    is_part = outcome.stopped or wanted.quick or given.no_layers or given.no_models
    if given.out is None and not is_part and wanted.peers == tuple(PEERS):
        write_tables(root)
    print(_ending(outcome, wanted))
    return 1 if outcome.failed else 0


def _wanted(given: argparse.Namespace, root: Path) -> Wanted:
    quick = given.quick or given.device == "cpu"
    peers = _some_of(tuple(PEERS), given.peers, "peers") if given.peers else ()
    return Wanted(
        device=torch.device(given.device),
        out=given.out or root / ("bench" if quick else RESULTS),
        dtypes=_some_of(DTYPES, given.dtypes, "dtypes"),
        peers=peers,
        layers=not given.no_layers,
        models=not given.no_models,
        quick=quick,
        minutes=given.minutes,
        resume=given.resume,
    )


def _ending(outcome: Outcome, wanted: Wanted) -> str:
    """Return what is said last."""
    lines = []
    if outcome.rows or outcome.models:
        lines.append(figures_table(figures(outcome.rows, outcome.models)))
    if outcome.stopped:
        lines.append("The time was over before all was measured; --resume goes on with it.")
    if outcome.failed:
        lines.append(f"Not all could be timed: see {len(outcome.failed)} cases above.")
    return "\n".join([*lines, f"The files: {wanted.out / outcome.name}*"])


def _refuse(why: str) -> int:
    print(f"python -m benchmarks.gpu: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; what was measured is written", file=sys.stderr)
        sys.exit(130)
