"""Claim 16: gamma and beta are learned by gradient descent, with the other parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.study.charts import Axis, Chart, Panel, Series
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.interval import difference
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.learned_affine import AFFINE, ENTRIES, STEPS, GradientCheck, H
from batchnorm.study.measures.runs import whole
from batchnorm.study.networks import norms
from batchnorm.study.observation import State
from batchnorm.study.plan import Plan
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.store import Store
from batchnorm.study.tasks import Task
from batchnorm.study.training import Run

_TOLERANCE = 1e-6
_MOVED = 0.01  # a hundredth of where gamma starts: less is hardly learning
_BINS = 30
_STYLES = ("batchnorm", "after", "plain", "ghost", "renormalized")  # of the first layers
_STARTS = {"gamma": 1.0, "beta": 0.0}

_Affine = Mapping[str, Sequence[Sequence[float]]]


def gamma_and_beta(state: State) -> _Affine | None:
    """Return the gamma and the beta of each layer, at the end."""
    if not state.last:
        return None
    return {
        name: [getattr(layer, attribute).tolist() for layer in norms(state.model)]
        for name, attribute in AFFINE.items()
    }


def tasks(plan: Plan, part: str) -> list[Task[Any]]:
    """Return the checks of the gradients, and the runs whose gamma and beta are looked at."""
    return [*_checks(plan, part), *_runs(plan, part)]


def _checks(plan: Plan, part: str) -> list[GradientCheck]:
    network = plan.networks[part]
    if network.activation == "relu":  # a difference quotient across a kink is no gradient
        network = replace(network, activation="elu")
    return [GradientCheck(plan.data, network, network.usual_rate, seed) for seed in plan.seeds]


def _runs(plan: Plan, part: str) -> list[Run]:
    return plan.runs(part, NORMALIZED, probes=(gamma_and_beta,))


def _errors_of(plan: Plan, part: str, store: Store) -> dict[str, list[float]]:
    """All errors of gamma and of beta, by the seed's largest."""
    outcomes = whole(store, _checks(plan, part))
    return {name: [max(outcome.errors[name]) for outcome in outcomes] for name in _STARTS}


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Compare gradients with difference quotients, and gamma and beta with where they started."""
    errors = _errors_of(plan, part, store)
    results = whole(store, _runs(plan, part))
    ends: list[_Affine] = [result.seen(gamma_and_beta)[0] for result in results]
    moved, rows, checks = {}, [], {}
    for name, start in _STARTS.items():
        values = [np.concatenate(end[name]) for end in ends]
        far = [float(np.sqrt(np.mean((value - start) ** 2))) for value in values]
        moved[name] = difference(far, [0.0])
        rows += [
            Row("batchnorm", f"error of the gradient of {name}", errors[name]),
            Row("batchnorm", f"{name}, change (root mean square)", far, moved[name]),
        ]
        for number in range(len(ends[0][name])):
            layer = [end[name][number] for end in ends]
            rows += [
                Row(f"layer {number + 1}", f"{name}, mean", [float(np.mean(of)) for of in layer]),
                Row(f"layer {number + 1}", f"{name}, spread", [float(np.std(of)) for of in layer]),
            ]
        checks[f"the gradient of {name} is right"] = max(errors[name]) < _TOLERANCE
        checks[f"{name} is learned"] = moved[name].low > _MOVED
    gammas = np.concatenate([np.concatenate(end["gamma"]) for end in ends])
    return Finding(
        part,
        f"In the {part} network gamma moves by {moved['gamma'].value:.2g} from 1, and beta by "
        f"{moved['beta'].value:.2g} from 0, the root mean square over all channels. The gradients "
        f"differ from difference quotients by {max(map(max, errors.values())):.0e} at the most.",
        f"moved by {moved['gamma'].value:.2g}",
        "1 ± 0",
        f"{gammas.mean():.2f} ± {gammas.std():.2f}",
        checks,
        rows,
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw each channel's gamma and beta, and the errors of the gradients."""
    return [
        Chart(
            "gamma-and-beta",
            "Histograms of gamma and beta at the end, over the channels of a layer and all seeds. "
            "The upright line is where all of them started.",
            [_histogram(plan, part, store, name) for part in parts for name in _STARTS],
        ),
        Chart(
            "gradient-errors",
            "The largest difference between a gradient and a difference quotient, as a share of "
            "the layer's largest gradient. Each dot is a seed, the bars are medians.",
            [_gradient_errors(plan, part, store) for part in parts],
        ),
    ]


def _histogram(plan: Plan, part: str, store: Store, name: str) -> Panel:
    """Return how the values of each layer are spread, pooled over the seeds, as steps."""
    ends = [result.seen(gamma_and_beta)[0][name] for result in whole(store, _runs(plan, part))]
    layers = [np.concatenate(of) for of in zip(*ends, strict=True)]
    start = _STARTS[name]
    edges = np.histogram_bin_edges([*np.concatenate(layers), start], _BINS)
    lines = []
    for number, (style, values) in enumerate(zip(_STYLES, layers, strict=False), start=1):
        shares = 100 * np.histogram(values, edges)[0] / len(values)
        steps = [0.0, *np.repeat(shares, 2).tolist(), 0.0]  # from the axis up, and down to it
        lines.append(Series(style, np.repeat(edges, 2).tolist(), steps, name=f"layer {number}"))
    highest = max(max(line.y) for line in lines)
    lines.append(Series("other", [start, start], [0.0, 1.05 * highest], name="start"))
    room = 0.02 * (edges[-1] - edges[0])
    return Panel(
        f"{part}, {name}",
        Axis(name, float(edges[0] - room), float(edges[-1] + room)),
        Axis("share of the channels, %", 0, 1.1 * highest),
        lines,
    )


def _gradient_errors(plan: Plan, part: str, store: Store) -> Panel:
    errors = {
        name: [max(error, 1e-17) for error in of]  # no difference has no logarithm
        for name, of in _errors_of(plan, part, store).items()
    }
    goal = (_TOLERANCE, "must stay below")
    styles = ["batchnorm"] * len(errors)
    return beside(part, "error, share", errors, styles=styles, log=True, goal=goal)


CLAIM = Claim(
    number=16,
    name="learned_affine",
    title="Gamma and beta are learned",
    says="Gamma and beta are parameters like the weights: the same gradients by backpropagation "
    "and the same descent train them. Frankle et al. (2020, arXiv:2003.00152) trained nothing "
    "but them and still got networks that classify. Against the weight they are given, Davis & "
    "Frank (Revisiting Batch Norm Initialization, ECCV 2022) saw that they hardly move from where "
    "they start in common networks.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3, algorithm 1",
    measured=f"After {STEPS} steps in float64 with the usual rate, the gradients of gamma and "
    "beta on the next batch of 60 are compared with central difference quotients through the whole "
    f"network, {H:g} to either side: for {ENTRIES} channels of each layer, drawn by the seed. "
    "The error is a share of the layer's largest gradient. ReLUs give way to ELUs here, as a "
    "quotient across a kink is no gradient. Then, in ordinary training in float32, all gamma and "
    "beta at the end are compared with the 1 and 0 that they started from.",
    rule=f"It holds for a network if every error is below {_TOLERANCE:g}, and if the root mean "
    "square over all channels of the change of gamma, and of beta, has a 95% interval over the "
    f"seeds above {_MOVED:g}.",
    unit="gamma, mean ± spread",
    parts=("sigmoid", "conv"),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
