"""What becomes of a monitor's records: plain data, a frame, scalars, a picture."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.diagnose.monitor_measures import (
    CHANNELS,
    MEASURES,
    PERCENTILES,
    Measured,
    Record,
    percentiles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What a layer's record is kept as: its measures, then its percentiles.
Row = NDArray[np.float64]
#: Where the gradients are in it, by the parameter.
GRADIENTS = {name: MEASURES.index(f"{name}_grad") for name in ("weight", "bias")}

_COLOURS = ("#1f6feb", "#d29922", "#a371f7", "#57ab5a")
_PANELS = 6


def row_of(since: float, measured: Measured) -> Row:
    """Return what is kept of a layer, the gradients still to come.

    Args:
        since: How many steps before the layer's previous record was.
        measured: What was measured of it.
    """
    numbers, sample = (v.cpu().double().numpy() for v in (measured.numbers, measured.sample))
    gradients = [math.nan] * len(GRADIENTS)
    return np.concatenate([[since], numbers, gradients, percentiles(sample).ravel()])


def record_of(step: int, layer: str, row: Row) -> Record:
    """Return a row as a record.

    Args:
        step: The step it is of.
        layer: The name of the layer.
        row: What is kept of it.
    """
    measures, rest = row[: len(MEASURES)].tolist(), row[len(MEASURES) :]
    of_each: list[list[float]] = rest.reshape(-1, len(PERCENTILES)).tolist()
    return Record(step, layer, of_each, *measures)


def by_layer(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records of each layer, in the order of the steps.

    Args:
        records: In any order of layers.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.layer, []).append(record)
    return found


def plain(records: Iterable[Record]) -> dict[str, Any]:
    """Return records as data that JSON can hold, a list a measure; None for what is not finite.

    Args:
        records: Of a monitor.
    """
    return {
        name: {
            "step": [record.step for record in own],
            "percentiles": [
                [[_finite(value) for value in three] for three in record.percentiles]
                for record in own
            ],
            **{
                measure: [_finite(getattr(record, measure)) for record in own]
                for measure in MEASURES
            },
        }
        for name, own in by_layer(records).items()
    }


def frame(records: Sequence[Record]) -> Any:
    """Return records as a pandas DataFrame, a row each.

    Args:
        records: Of a monitor.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ImportError(
            "to_frame needs pandas: pip install pandas; to_dict gives the same as plain data"
        ) from error
    columns: dict[str, list[Any]] = {
        "step": [record.step for record in records],
        "layer": [record.layer for record in records],
    }
    columns |= {name: [getattr(record, name) for record in records] for name in MEASURES}
    for channel in range(CHANNELS):
        for at, level in enumerate(PERCENTILES):
            columns[f"p{level}_{channel}"] = [
                r.percentiles[channel][at] if channel < len(r.percentiles) else math.nan
                for r in records
            ]
    return pandas.DataFrame(columns)


def write(writer: Any, records: Iterable[Record]) -> None:
    """Write records as TensorBoard's scalars, with the percentiles of the first channel alone.

    Args:
        writer: What has `add_scalar(name, value, step)`.
        records: Of a monitor.
    """
    for record in records:
        values = {name: getattr(record, name) for name in MEASURES if name != "since"}
        levels = (f"p{level}" for level in PERCENTILES)
        values |= dict(zip(levels, record.percentiles[0], strict=True))
        for name, value in values.items():
            if not math.isnan(value):
                writer.add_scalar(f"batchnorm_{name}/{record.layer}", value, record.step)


def moved_most(records: Iterable[Record]) -> list[tuple[str, float]]:
    """Return the layers with their mean distance between records, the largest first.

    Args:
        records: Of a monitor.
    """
    found = []
    for name, own in by_layer(records).items():
        distances = [record.moved for record in own if math.isfinite(record.moved)]
        if distances:
            found.append((name, sum(distances) / len(distances)))
    return sorted(found, key=lambda pair: -pair[1])


def draw(records: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw the percentiles of layers by step, and beside them the distances.

    Args:
        records: By layer. Of more than 6 layers there are 6, evenly over the depth.
    """
    from matplotlib.figure import Figure

    names = list(records)
    count = min(len(names), _PANELS)
    names = [names[round(at * (len(names) - 1) / max(count - 1, 1))] for at in range(count)]
    figure = Figure(figsize=(8.4, 0.6 + 1.8 * count), layout="constrained")
    panels = figure.subplots(count, 2, sharex=True, squeeze=False)
    for name, (bands, distances) in zip(names, panels, strict=True):
        own = records[name]
        steps = [record.step for record in own]
        kept = _shown([record.percentiles for record in own])
        for channel, colour in zip(range(kept.shape[1]), _COLOURS, strict=False):
            low, middle, high = kept[:, channel].T
            bands.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            bands.plot(steps, middle, color=colour, linewidth=1)
        bands.set_title(name, fontsize=9, loc="left", parse_math=False)
        for measure, style, label in (
            ("moved", "-", "from the record before"),
            ("from_running", ":", "from the running statistics"),
        ):
            values = _shown([getattr(record, measure) for record in own])
            distances.plot(steps, values, style, color="#57606a", linewidth=1, label=label)
        if any(record.moved > 0 or record.from_running > 0 for record in own):
            distances.set_yscale("log", nonpositive="mask")
        for axes in (bands, distances):
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 1].set_title("distance", fontsize=9, loc="left")
    panels[0, 1].legend(fontsize=7, frameon=False)
    panels[-1, 0].set_xlabel("step; percentiles 15 to 85, and the median, by channel", fontsize=8)
    panels[-1, 1].set_xlabel("step", fontsize=8)
    return figure


def _shown(values: Sequence[Any]) -> Row:
    """Return values as they can be drawn: what is not finite leaves a gap."""
    found = np.array(values, np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
