"""No claim of the notes, but what the verdicts rest on: ours computes what `torch.nn` does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.measures.runs import whole
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED, TORCH
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_STEPS = 200  # or all of a shorter run
_TOLERANCE = 1e-9  # for float64, which rounds at 1e-16: training lets rounding grow with each step
_FLOOR = 1e-17  # where no difference is drawn, as a logarithm has no 0


def tasks(plan: Plan, part: str) -> list[Run]:
    """Return the same runs with `torch.nn` and with ours, in float64 and in float32."""
    return [run for pair in _pairs(plan, part).values() for run in pair]


def _pairs(plan: Plan, part: str) -> dict[str, list[Run]]:
    steps = min(_STEPS, plan.networks[part].steps)
    return {
        dtype: [plan.run(part, recipe, steps=steps, dtype=dtype) for recipe in (TORCH, NORMALIZED)]
        for dtype in ("float32", "float64")
    }


def _differences(pair: Sequence[Run], store: Store) -> list[float]:
    theirs, ours = (result.losses for result in whole(store, pair))
    return [abs(a - b) for a, b in zip(theirs, ours, strict=True)]


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Find the largest difference between the losses of a step."""
    pairs = _pairs(plan, part)
    largest = {dtype: max(_differences(pair, store)) for dtype, pair in pairs.items()}
    theirs, ours = (store[run].losses[-1] for run in pairs["float64"])
    return Finding(
        part,
        f"Over {pairs['float64'][0].steps} steps of the {part} network, the losses with torch.nn "
        f"and with batchnorm differ by {largest['float64']:.0e} at the most in float64, by "
        f"{largest['float32']:.0e} in float32.",
        f"within {largest['float64']:.0e}",
        f"{theirs:.6f}",
        f"{ours:.6f}",
        {"the same losses in float64": largest["float64"] <= _TOLERANCE},
        [Row(dtype, "largest difference of a loss", [value]) for dtype, value in largest.items()],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw how the difference grows."""
    return [
        Chart(
            "differences",
            "The largest difference, until each step, between the losses with torch.nn and with "
            "batchnorm, from the same weights, on the same batches.",
            [_panel(plan, part, store) for part in parts],
        )
    ]


def _panel(plan: Plan, part: str, store: Store) -> Panel:
    lines = []
    for dtype, pair in _pairs(plan, part).items():
        y = list(accumulate(_differences(pair, store), max, initial=_FLOOR))[1:]
        lines.append(Series(dtype, range(1, len(y) + 1), y))
    ticks = [(10.0**power, f"1e{power}") for power in range(-16, 2, 4)]
    return Panel(
        f"{part}, rate {plan.networks[part].usual_rate:g}",
        Axis("step", 1, len(lines[0].x)),
        Axis("largest difference so far", _FLOOR, 10, log=True, ticks=ticks),
        lines,
        goal=(_TOLERANCE, "float64 must stay below"),
    )


CLAIM = Claim(
    number=0,
    name="agreement",
    title="The same numbers as torch.nn",
    says="The notes compare networks with and without batch normalization. That holds for both "
    "implementations here only if they compute the same.",
    source="a check of this study's own",
    measured="Two runs with the same seed, one with torch.nn's batch normalization and one with "
    f"batchnorm's, are compared loss by loss over up to {_STEPS} steps. "
    "Where there was a compiler, batchnorm runs on its native kernels, here as in the whole study.",
    rule=f"It holds for a network if no two losses differ by more than {_TOLERANCE:g} in float64.",
    unit="last loss: torch.nn, batchnorm",
    parts=("sigmoid", "conv", "residual"),
    tasks=tasks,
    measure=measure,
    charts=charts,
    any_network=True,
)
