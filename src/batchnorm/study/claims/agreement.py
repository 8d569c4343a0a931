"""No claim of the notes, but what the verdicts rest on: ours computes what `torch.nn` does."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, islice

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.training import Run

_STEPS = 200  # or all of a shorter run
_TOLERANCE = 1e-9  # for float64, which rounds at 1e-16: training lets rounding grow with each step
_FLOOR = 1e-17  # where no difference is drawn, as a logarithm has no 0


def tasks(plan: Plan) -> list[Run]:
    """Return the same runs with `torch.nn` and with ours, in float64 and from the grid."""
    return [
        run for network in plan.sizes for pair in _pairs(network, plan).values() for run in pair
    ]


def measure(plan: Plan, store: Store) -> list[Finding]:
    """Find the largest difference between the losses of a step."""
    return [_with(network, plan, store) for network in plan.sizes]


def _pairs(network: str, plan: Plan) -> dict[str, list[Run]]:
    rate = plan.sizes[network].usual_rate
    grid = [plan.run(network, norm, rate, plan.seeds[0]) for norm in ("torch", "batchnorm")]
    double = [replace(run, steps=_steps(network, plan), dtype="float64") for run in grid]
    return {"float32": grid, "float64": double}


def _steps(network: str, plan: Plan) -> int:
    return min(_STEPS, plan.sizes[network].steps)


def _differences(pair: list[Run], plan: Plan, store: Store) -> list[float]:
    theirs, ours = (store[run].losses for run in pair)
    both = islice(zip(theirs, ours, strict=False), _steps(pair[0].network, plan))
    return [abs(a - b) for a, b in both]


def _with(network: str, plan: Plan, store: Store) -> Finding:
    pairs = _pairs(network, plan)
    for run in [run for pair in pairs.values() for run in pair]:
        if reason := store[run].reason:
            return Finding(network, f"{run}, broke off: {reason}.", "broke off")
    largest = {dtype: max(_differences(pair, plan, store)) for dtype, pair in pairs.items()}
    steps = _steps(network, plan)
    theirs, ours = (store[run].losses[steps - 1] for run in pairs["float64"])
    return Finding(
        network,
        f"Over {steps} steps of the {network} network, the losses with torch.nn and with "
        f"batchnorm differ by {largest['float64']:.0e} at the most in float64, by "
        f"{largest['float32']:.0e} in float32.",
        f"within {largest['float64']:.0e}",
        {"torch": f"{theirs:.6f}", "batchnorm": f"{ours:.6f}"},
        [largest["float64"] <= _TOLERANCE],
        [(network, dtype, f"{difference:.1e}") for dtype, difference in largest.items()],
    )


def charts(plan: Plan, store: Store) -> list[Chart]:
    """Draw how the difference grows."""
    return [
        Chart(
            "differences",
            "The largest difference, until each step, between the losses with torch.nn and with "
            "batchnorm, from the same weights, on the same batches.",
            [_panel(network, plan, store) for network in plan.sizes],
        )
    ]


def _panel(network: str, plan: Plan, store: Store) -> Panel:
    lines = []
    for dtype, pair in _pairs(network, plan).items():
        y = list(accumulate(_differences(pair, plan, store), max, initial=_FLOOR))[1:]
        lines.append(Series(dtype, range(1, len(y) + 1), y))
    ticks = [(10.0**power, f"1e{power}") for power in range(-16, 2, 4)]
    return Panel(
        f"{network}, rate {plan.sizes[network].usual_rate:g}",
        Axis("step", 1, _steps(network, plan)),
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
    unit="last loss",
    headings=("network", "type", "largest difference"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
