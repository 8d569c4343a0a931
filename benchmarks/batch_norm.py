"""Measure everything, and write what came of it into this repository: `make bench`.

The table and the picture go to benchmarks/results, with the hardware and the versions, and their
summary into README.md. `batchnorm bench` measures the same, or a part of it, elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from batchnorm.bench.cases import Wanted
from batchnorm.bench.conduct import conduct
from batchnorm.bench.save import put
from batchnorm.bench.tables import markdown

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench table: written by `make bench` -->", "<!-- end of bench table -->"


def main(wanted: Wanted, root: Path = ROOT) -> None:
    """Measure what is wanted, and write it.

    Args:
        wanted: What is measured.
        root: The folder of README.md and benchmarks/.
    """
    rows = conduct(wanted, root / "benchmarks" / "results", console=Console())
    put(root / "README.md", BEGIN, markdown(rows), END)


if __name__ == "__main__":
    try:
        main(Wanted())
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        sys.exit(130)
