"""How whole models run as they are, and with each of our tools: `make bench-models`.

Every way is checked before it is timed: ours in float64, where the losses of two steps have to be
those of the model as it is, and torch.compile by the first loss in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from batchnorm.bench.conduct import say_if_busy, shown_on
from batchnorm.bench.save import check_folder, put, save
from batchnorm.environment import describe
from benchmarks.models.measure import ROOT, Row, measured, own_peak, peak_of
from benchmarks.models.networks import NETWORKS, Network, pose
from benchmarks.models.tables import figures, markdown, png
from benchmarks.models.ways import ACCELERATED, COMPILED, MODES, SAVING, STOCK, TRAINING

BEGIN, END = "<!-- models table: written by `make bench-models` -->", "<!-- end of models table -->"
FIGURES = "<!-- figures: written by `make bench-models` -->", "<!-- end of figures -->"
#: Of the first network both are measured.
LAYOUTS = ("NHWC", "NCHW")
#: Two steps each, of which one is timed.
ROUNDS = 10
PEAKS = (STOCK, ACCELERATED, SAVING, COMPILED)


def conduct(names: Sequence[str], quick: bool, out: Path, console: Console) -> list[Row]:
    """Measure networks, and write what came of it.

    Args:
        names: Of the networks.
        quick: Whether they are small, and timed a few times.
        out: The folder of the results.
        console: Where it is shown how far it is.
    """
    check_folder(out)
    made_on = {**describe(), "load": round(say_if_busy(console), 2), "quick": quick}
    tasks = [
        (NETWORKS[name].quick() if quick else NETWORKS[name], name, layout)
        for name in names
        for layout in (LAYOUTS if name == names[0] else LAYOUTS[:1])
    ]
    rows: list[Row] = []
    with shown_on(console) as progress:
        bar = progress.add_task("", total=2 * len(tasks))
        for network, name, layout in tasks:
            progress.update(bar, description=f"{network.title}, {layout}", refresh=True)
            rows += _of(network, name, layout, quick, lambda: progress.advance(bar))
            save(out, rows, made_on, png(rows), "models")  # what is measured stays, if it is killed
    console.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)
    return rows


def _of(
    network: Network,
    name: str,
    layout: str,
    quick: bool,
    advance: Callable[[], None],
) -> Iterator[Row]:
    high: dict[str, float] = {}
    if layout == LAYOUTS[0]:
        high = {way.name: peak_of(name, layout, way.name, quick) for way in PEAKS}
    posed = pose(network, layout)
    for mode in MODES:
        yield from measured(posed, mode, 3 if quick else ROUNDS, high if mode == TRAINING else {})
        advance()


def main() -> None:
    """Measure, and write the tables of README.md and docs/bench.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small networks, for trying it")
    parser.add_argument("--models", default=",".join(NETWORKS), help="by default %(default)s")
    parser.add_argument("--out", type=Path, help="another folder; README.md is left alone then")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(own_peak(*json.loads(given.peak)))
        return
    names = given.models.split(",")
    if unknown := set(names) - NETWORKS.keys():
        parser.error(f"--models has {', '.join(unknown)}: expected some of {', '.join(NETWORKS)}")
    whole = given.out is None and not given.quick
    out = given.out or ROOT / ("benchmarks/results" if whole else "bench")
    rows = conduct(names, given.quick, out, Console())
    if whole:
        picture = "![Times the speed of the models as they are](benchmarks/results/models.png)"
        put(ROOT / "README.md", BEGIN, f"{markdown(rows)}\n\n{picture}", END)
        put(ROOT / "docs" / "bench.md", FIGURES[0], figures(rows), FIGURES[1])


if __name__ == "__main__":
    main()
