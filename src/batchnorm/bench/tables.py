"""The rows in short: for a terminal of 80 columns, and for a README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.bench.cases import BOTH, DTYPES, FUSIONS, PLAIN, RELU, RESIDUAL
from batchnorm.bench.contenders import BASE, NATIVE, PEERS
from batchnorm.bench.figures import figures
from batchnorm.bench.rows import Row

_HEADINGS = {PLAIN: "plain", RELU: "relu", RESIDUAL: "res."}
_PEERS = {peer.name: name for name, peer in PEERS.items()}


def terminal(rows: Sequence[Row]) -> RenderableType:
    """Return the tables for a terminal: one for each mode, type and number of threads.

    Args:
        rows: All that was measured.
    """

    def key(row: Row) -> tuple[int, str, str]:
        return -row.threads, row.dtype, row.mode

    order = sorted(rows, key=lambda row: (-row.threads, DTYPES.index(row.dtype), row.mode))
    tables = [part for _, group in groupby(order, key) for part in _terminal(list(group))]
    summary = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    summary.add_column(ratio=1)
    for heading in ("", "required", "aim"):
        summary.add_column(heading, justify="right", no_wrap=True)
    for figure in figures(rows):
        summary.add_row(figure.name.replace("`", ""), *figure[1:])
    return Group(*tables, Text(_legend(rows), style="dim"), summary)


def _legend(rows: Sequence[Row]) -> str:
    """Return what the columns mean."""
    detail = {PLAIN: "alone", RELU: "with ReLU", RESIDUAL: "with residual and ReLU"}[_detail(rows)]
    return (
        f"Times the speed of {BASE.name}: {NATIVE.name} (plain, relu, residual + relu), the others "
        f"{detail}. ms: the time of {BASE.name}, {detail}. floor: the least time for moving the "
        f"bytes at the speed of a large copy, as a part of {NATIVE.name}'s time, {detail}."
    )


def _detail(rows: Sequence[Row]) -> str:
    """Return the fusion that is shown with its time and all peers."""
    return next(fusion for fusion in (RELU, *FUSIONS) if any(row.fusion == fusion for row in rows))


def _terminal(rows: list[Row]) -> tuple[Text, Table]:
    """Return title and table of one mode, type and number of threads: a line a shape and layout."""
    some, detail = rows[0], _detail(rows)
    fusions = [fusion for fusion in FUSIONS if any(row.fusion == fusion for row in rows)]
    peers = [name for name in _PEERS if any(row.implementation == name for row in rows)]
    ours = any(row.implementation == NATIVE.name for row in rows)
    plural = "s" if some.threads > 1 else ""
    title = Text(f"{some.mode}, {some.dtype}, {some.threads} thread{plural}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("shape", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    headings = ["MB", "ms", *(_HEADINGS[fusion] for fusion in fusions if ours)]
    for heading in [*headings, *(_PEERS[peer] for peer in peers), *(["floor"] if ours else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for group in _by_shape(rows):
        found = {(row.implementation, row.fusion): row for row in group}
        base = found[BASE.name, detail]
        shown = [found.get((NATIVE.name, fusion)) for fusion in fusions if ours]
        shown += [found.get((peer, detail)) for peer in peers]
        own = found.get((NATIVE.name, detail))
        table.add_row(
            base.shape,
            base.layout,
            _digits(base.mb),
            _digits(base.median_us / 1e3),
            *("" if row is None else _digits(row.ratio) for row in shown),
            *([f"{own.of_floor:.0%}"] if own is not None else []),
        )
    return title, table


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of BN + ReLU, forward and backward, in float32, and the figures.

    Args:
        rows: All that was measured.
    """
    most = max(row.threads for row in rows)
    chosen = [
        r for r in rows
        if (r.mode, r.fusion, r.dtype, r.threads) == (BOTH, RELU, DTYPES[0], most)
    ]  # fmt: skip
    names = [
        name for name in (NATIVE.name, *_PEERS) if any(r.implementation == name for r in chosen)
    ]
    lines = [
        ["shape", "layout", "MB", f"`{BASE.name}`, ms", *(f"`{n}`" for n in names), "of the floor"],
        ["---", "---", *("---:" for _ in range(len(names) + 3))],
    ]
    for group in _by_shape(chosen):
        found = {row.implementation: row for row in group}
        base = found[BASE.name]
        cells = [f"{_digits(found[name].ratio)}x" if name in found else "" for name in names]
        own = found.get(NATIVE.name)
        lines.append(
            [base.shape, base.layout, _digits(base.mb), _digits(base.median_us / 1e3), *cells,
             "" if own is None else f"{own.of_floor:.0%}"]
        )  # fmt: skip
    lines += [
        [],
        [f"`{NATIVE.name}`, means over shapes are geometric", "", "required", "aim"],
        ["---", "---:", "---:", "---:"],
        *(list(figure) for figure in figures(rows)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def _by_shape(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of each shape and layout, in the order of the first of each."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.shape, row.layout), []).append(row)
    yield from groups.values()


def _digits(value: float) -> str:
    """Return a number in at most five characters, up to 99999."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
