"""What share of the speed of a copy each has, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from batchnorm.bench.cases import RESIDUAL
from benchmarks.gpu.contenders import BASE, OURS, PEERS
from benchmarks.gpu.rows import CALL, GRAPH, LAUNCHES, Row

_NAMES = (BASE.name, OURS.name, *(peer.name for peer in PEERS.values()))


def png(rows: Sequence[Row]) -> bytes:
    """Draw by layer what share of the speed of a large copy each has, forward and backward.

    Args:
        rows: All that was measured.

    Returns:
        The content of a PNG file.
    """
    some = rows[0]
    like = [r for r in rows if (r.mode, r.dtype) == (some.mode, some.dtype)]
    fusion = RESIDUAL if any(row.fusion == RESIDUAL for row in like) else some.fusion
    chosen = [row for row in like if row.fusion == fusion]
    places = list(dict.fromkeys((row.shape, row.layout) for row in chosen))
    picture = Figure(figsize=(7.2, 1.6 + 0.24 * len(places)), layout="constrained")
    axes = picture.subplots()
    for name in dict.fromkeys(row.implementation for row in chosen):
        for launch, face in ((CALL, None), (GRAPH, "none")):
            own = [r for r in chosen if (r.implementation, r.launch) == (name, launch)]
            if own:
                points = [r.of_floor for r in own], [places.index((r.shape, r.layout)) for r in own]
                label = f"{name}{LAUNCHES[launch]}"
                colour = f"C{_NAMES.index(name)}"
                axes.scatter(*points, facecolors=face or colour, edgecolors=colour, label=label)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(places)))
    axes.set_yticklabels([f"{shape} {layout}" for shape, layout in places], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("the least time at the speed of a large copy / the time")
    axes.set_title(f"BN, {fusion}, {some.mode}, {some.dtype}", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    picture.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=3)
    content = io.BytesIO()
    picture.savefig(content, format="png", dpi=130)
    return content.getvalue()
