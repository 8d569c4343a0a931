"""Measure whole models, and write what came of it into this repository: `make bench-models`.

The tables go to README.md and docs/bench.md, all rows and the picture to benchmarks/results. With
`--quick`, `--models` or `--out` it writes to a folder alone: a part is not the whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from batchnorm.bench.errors import BenchError, WrongResult
from batchnorm.bench.save import put
from benchmarks.models.conduct import Wanted, conduct
from benchmarks.models.networks import NETWORKS
from benchmarks.models.tables import details, markdown
from benchmarks.models.ways import PEERS

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- models table: written by `make bench-models` -->", "<!-- end of models table -->"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Measure what is asked for, and write it.

    Args:
        arguments: Of the command line; those it was called with if left out.
        root: The folder of README.md, docs/ and benchmarks/.
    """
    usual = Wanted()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks, in a minute")
    parser.add_argument("--models", help=f"some of {', '.join(NETWORKS)}, with commas")
    parser.add_argument(
        "--peers",
        help=f"some of {', '.join(PEERS)}, with commas, or none; on every network then, else on "
        "the first",
    )
    parser.add_argument("--steps", type=_positive, default=usual.steps, help="steps of training")
    parser.add_argument(
        "--seconds", type=float, default=usual.seconds, help="for how long inference is timed"
    )
    parser.add_argument(
        "--cap", type=float, default=usual.cap, help="seconds in which a peer has to compile"
    )
    parser.add_argument("--out", type=Path, help="where the files go")
    chosen = parser.parse_args(arguments)
    wanted = Wanted(
        tuple(NETWORKS) if chosen.models is None else tuple(chosen.models.split(",")),
        chosen.quick,
        _peers(chosen.peers),
        chosen.steps,
        chosen.seconds,
        chosen.cap,
    )
    whole = not chosen.quick and chosen.models is None and chosen.out is None
    folder = chosen.out or (root / "benchmarks" / "results" if whole else Path("bench"))
    try:
        rows = conduct(wanted, folder, console=Console())
    except (BenchError, WrongResult) as error:
        sys.exit(f"Error: {error}")
    if whole:
        put(root / "README.md", BEGIN, markdown(rows), END)
        put(root / "docs" / "bench.md", BEGIN, details(rows), END)


def _peers(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(text.split(","))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return number


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        sys.exit(130)
