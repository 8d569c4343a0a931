"""What was measured on a GPU, as the tables of README.md and docs/bench.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.bench.cases import BOTH, RELU, RESIDUAL
from benchmarks.gpu.cases import LAYOUTS
from benchmarks.gpu.contenders import BASE, OURS, PEERS
from benchmarks.gpu.figures import Figure, figures, rows_of
from benchmarks.gpu.rows import CALL, GRAPH, Row
from benchmarks.models.measure import Row as ModelRow


def figures_table(found: Sequence[Figure]) -> str:
    """Return the figures as a table.

    Args:
        found: The figures.
    """
    lines = [["forward + backward", "must be", "aim", *LAYOUTS], ["---", *["---:"] * 4]]
    lines += [[f.name, f.must, f.aim, *(f.values.get(v, "") for v in LAYOUTS)] for f in found]
    return _joined(lines)


def layers_table(rows: Sequence[Row]) -> str:
    """Return a line for each shape and layout, forward and backward, of the first type.

    Args:
        rows: All that was measured.
    """
    main = [row for row in rows if row.mode == BOTH and row.dtype == rows[0].dtype]
    names = [peer.name for peer in PEERS.values() if rows_of(main, RELU, CALL, peer.name)]
    head = ["shape", "layers", "layout", f"`{BASE.name}`, us", f"`{OURS.name}`"]
    head += [*(f"`{name}`" for name in names), "of the floor", "graph", "with add", "graph"]
    lines = [head, ["---", "---:", "---", *["---:"] * (len(head) - 3)]]
    found = {(r.shape, r.layout, r.fusion, r.implementation, r.launch): r for r in main}
    for base in rows_of(main, RELU, CALL, BASE.name):
        key = base.shape, base.layout
        ratios = [found.get((*key, RELU, name, CALL)) for name in (OURS.name, *names)]
        shares = [
            found.get((*key, fusion, OURS.name, launch))
            for fusion in (RELU, RESIDUAL)
            for launch in (CALL, GRAPH)
        ]
        lines.append(
            [base.shape, str(base.layers), base.layout, f"{base.median_us:.0f}"]
            + ["" if row is None else f"{row.ratio:.2f}x" for row in ratios]
            + ["" if row is None else f"{row.of_floor:.0%}" for row in shares]
        )
    return _joined(lines)


def models_table(models: Sequence[ModelRow]) -> str:
    """Return a line for each way to train the model.

    Args:
        models: All that was measured.
    """
    some = models[0]
    head = f"{some.network}, {some.layout}, {some.batch} images, bfloat16 autocast"
    lines = [[head, "step, ms", "speed", "peak, GB", "peak", "losses apart"]]
    lines.append(["---", *["---:"] * 5])
    for row in models:
        peak = ["", ""] if row.peak_mb is None else [f"{row.peak_mb / 1e3:.1f}", f"{row.peak:.2f}"]
        apart = "" if row.apart is None else f"{row.apart:.0e}"
        lines.append([row.way, f"{row.median_ms:.1f}", f"{row.ratio:.2f}x", *peak, apart])
    return _joined(lines)


def markdown(
    made_on: Mapping[str, Any], rows: Sequence[Row], models: Sequence[ModelRow], picture: str
) -> str:
    """Return what README.md says of one GPU.

    Args:
        made_on: The hardware and the versions.
        rows: Those of the layers.
        models: Those of the models.
        picture: Where the picture of the layers is.
    """
    heading = (
        f"**{made_on['gpu']}**, driver {made_on.get('driver', 'unknown')}, CUDA {made_on['cuda']}, "
        f"torch {made_on['torch']}, Triton {made_on['triton']}, JAX {made_on['jax']}"
    )
    parts = [heading]
    if rows:
        parts += [f"BN + ReLU, forward + backward, {rows[0].dtype}:", layers_table(rows)]
    if models:
        parts.append(models_table(models))
    parts.append(figures_table(figures(rows, models)))
    if rows:
        parts.append(f"![Share of the speed of a large copy, by layer]({picture})")
    return "\n\n".join(parts)


def _joined(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
