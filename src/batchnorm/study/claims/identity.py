"""Claim 15: with gamma = sqrt(var + eps) and beta = mu the layer is the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.study.charts import Chart, Panel
from batchnorm.study.claims.claim import Claim, Finding, Row
from batchnorm.study.data import DataSet
from batchnorm.study.descent import one_thread
from batchnorm.study.interval import short
from batchnorm.study.measures.drawing import beside
from batchnorm.study.measures.implementations import EPS, NORMALIZE
from batchnorm.study.measures.runs import whole
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store
from batchnorm.study.tasks import Outcome, Task

_EXAMPLES = 60  # as in a step of training
_TOLERANCES = {"float64": 1e-12, "float32": 1e-5}
_FLOOR = 1e-17  # where no difference is drawn, as a logarithm has no 0
_NAMES = {"reference": "reference, float64"}  # it computes in float64 whatever it is given
_USUAL, _OTHER = "γ=1, β=0", "another batch"


@dataclass(frozen=True, kw_only=True)
class Differences(Outcome):
    """How far outputs are from inputs, in units of the largest input of a channel.

    Attributes:
        largest: By the type and the implementation, the largest of all values. Beside them what
            batchnorm's layer does with gamma = 1 and beta = 0, and what the layer that is the
            identity for one batch does to another.
    """

    largest: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity(Task[Differences]):
    """A batch through layers whose gamma and beta are set by its own moments.

    Attributes:
        seed: What the batch is drawn by.
    """

    kind = "identity"
    outcome = Differences

    seed: int

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes."""
        return 0.1

    def perform(self, data_set: DataSet) -> Differences:
        """Compare outputs and inputs, both as features and as pictures."""
        inputs = torch.from_numpy(data_set.train_inputs)
        count = min(_EXAMPLES, len(inputs) // 2)
        order = np.random.default_rng(self.seed).permutation(len(inputs))
        batch, other = (inputs[order[start : start + count]] for start in (0, count))
        largest = {}
        with one_thread():
            for name in _TOLERANCES:
                dtype: torch.dtype = getattr(torch, name)
                pictures = _differences(batch.to(dtype), other.to(dtype))
                features = _differences(batch.flatten(1).to(dtype), other.flatten(1).to(dtype))
                largest[name] = {key: max(pictures[key], features[key]) for key in features}
        return Differences(largest=largest)

    def __str__(self) -> str:
        return f"the identity, seed {self.seed}"


def _differences(x: Tensor, other: Tensor) -> dict[str, float]:
    """Send a batch through every implementation, and another one through batchnorm's."""
    moments = reference.moments(x.double().numpy())
    gamma, beta = (torch.from_numpy(of) for of in (np.sqrt(moments.var() + EPS), moments.mean))
    ours = NORMALIZE["batchnorm"]
    found = {name: _apart(by(x, gamma, beta), x) for name, by in NORMALIZE.items()}
    found[_OTHER] = _apart(ours(other, gamma, beta), other)
    found[_USUAL] = _apart(ours(x, torch.ones_like(gamma), torch.zeros_like(beta)), x)
    return found


def _apart(y: Tensor, x: Tensor) -> float:
    """Return the largest difference, in units of the largest input of its channel."""
    y, x = y.double().transpose(0, 1).flatten(1), x.double().transpose(0, 1).flatten(1)
    largest = x.abs().amax(1)
    # A channel of zeros has no unit: there, the difference itself counts.
    unit = torch.where(largest > 0, largest, 1.0)
    return float(((y - x).abs().amax(1) / unit).max())


def tasks(plan: Plan, part: str) -> list[Identity]:
    """Return a task for each seed."""
    return [Identity(plan.data, seed) for seed in plan.seeds]


def _found(plan: Plan, part: str, store: Store) -> dict[str, dict[str, list[float]]]:
    """Return by type and implementation, what each seed found."""
    outcomes = whole(store, tasks(plan, part))
    return {
        dtype: {name: [of.largest[dtype][name] for of in outcomes] for name in names}
        for dtype, names in outcomes[0].largest.items()
    }


def measure(plan: Plan, part: str, store: Store) -> Finding:
    """Find the largest difference between outputs and inputs."""
    found = _found(plan, part, store)
    largest = {
        dtype: max(value for name in NORMALIZE for value in of[name]) for dtype, of in found.items()
    }
    usual, other = (max(found["float64"][name]) for name in (_USUAL, _OTHER))
    return Finding(
        part,
        f"With γ = √(σ² + ε) and β = μ of a batch, its outputs differ from its inputs by "
        f"{largest['float64']:.0e} of a channel's largest input in float64, and by "
        f"{largest['float32']:.0e} in float32, by any of the implementations; with {_USUAL} by "
        f"{short(usual)}. Another batch is changed by the same layer by up to {short(other)}: it "
        f"is the identity only for the batch whose moments they are.",
        f"within {largest['float64']:.0e}",
        short(usual),
        f"{largest['float64']:.0e}",
        {
            f"the identity in {dtype}": largest[dtype] <= tolerance
            for dtype, tolerance in _TOLERANCES.items()
        },
        [
            Row(_NAMES.get(name, name), f"largest difference, inputs in {dtype}", values)
            for dtype, of in found.items()
            for name, values in of.items()
        ],
    )


def charts(plan: Plan, parts: Sequence[str], store: Store) -> list[Chart]:
    """Draw the differences."""
    caption = (
        "The largest difference between outputs and inputs, in units of the largest input of a "
        "channel. Each dot is a random batch. The dotted line is what rounding may do."
    )
    panels = [
        _panel(dtype, of) for part in parts for dtype, of in _found(plan, part, store).items()
    ]
    return [Chart("identity", caption, panels)]


def _panel(dtype: str, found: Mapping[str, Sequence[float]]) -> Panel:
    return beside(
        dtype,
        "largest difference",
        {_NAMES.get(name, name): [max(v, _FLOOR) for v in of] for name, of in found.items()},
        styles=["other", "torch", "batchnorm", "plain", "plain"],
        log=True,
        start=_FLOOR,
        end=1e3,
        goal=(_TOLERANCES[dtype], "rounding"),
    )


CLAIM = Claim(
    number=15,
    name="identity",
    title="γ and β can undo it",
    says="With γ = √(σ² + ε) and β = μ the layer is the identity, so a network loses nothing that "
    "it could represent. Against it: μ and σ² are those of a batch, so in training one γ and one β "
    "undo the normalization of one batch only, and change another as far as its moments differ: "
    "most where a channel hardly varies in a batch, or not at all. In evaluation, where the "
    "moments are fixed, they undo it for all.",
    source="lecture notes; Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3",
    measured=f"For each seed {_EXAMPLES} training examples are drawn. γ and β are set by the "
    "moments of this batch, computed in float64, and the batch passes the layers of torch.nn and "
    f"of batchnorm in training, and batchnorm.reference, with ε = {EPS:g}: as features (N, F), and "
    "as pictures (N, C, H, W) with one mean and variance a channel. The largest difference between "
    "output and input is told in units of the channel's largest input. For comparison, another "
    "batch passes the same layer, and the first one a layer with γ = 1 and β = 0.",
    rule="It holds if no value, in no batch, by no implementation, differs by more than "
    f"{_TOLERANCES['float64']:g} in float64 and {_TOLERANCES['float32']:g} in float32, which is "
    "rounding.",
    unit="largest difference: γ = 1, β = 0; γ = √(σ² + ε), β = μ",
    parts=("layer",),
    tasks=tasks,
    measure=measure,
    charts=charts,
)
