"""One training run: declared as data, the same every time, and a result whatever happens in it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from batchnorm.study import events
from batchnorm.study.data import DataSet
from batchnorm.study.descent import (
    accuracy,
    batches,
    evaluate,
    next_evaluation,
    one_thread,
    some,
    step,
)
from batchnorm.study.networks import Network, build
from batchnorm.study.observation import Probe, Result, State, Treatment, probe_name
from batchnorm.study.recipes import Recipe
from batchnorm.study.tasks import Outcome, Task

# What a step takes, in steps with batch normalization, where it is told in advance.
_DEARNESS = {"plain": 0.6, "torch": 1.0, "batchnorm": 1.0, "ghost": 1.5, "renormalized": 2.3}


@dataclass(frozen=True)
class Run(Task[Result]):
    """A network trained by plain stochastic gradient descent, as in Ioffe & Szegedy (2015).

    Attributes:
        network: What is trained.
        recipe: How it is made.
        learning_rate: The length of a step, in units of the gradient.
        seed: What the initial weights and the order of the examples are drawn by.
        steps: How many steps are taken.
        batch_size: Examples in a step.
        dtype: The type of the weights and the activations.
        examples: With how many training examples; 0 for all.
        treatment: What is done to the data set first.
        growth: Probes look each time that the steps have grown by this factor.
        probes: What is looked at on the way. Runs that differ in it alone are equal, and are done
            once for the probes of all.
    """

    kind = "run"
    outcome = Result

    network: Network
    recipe: Recipe
    learning_rate: float
    seed: int
    steps: int
    batch_size: int = 60
    dtype: str = "float32"
    examples: int = 0
    treatment: Treatment | None = None
    growth: float = 1.5
    probes: tuple[Probe, ...] = field(default=(), compare=False)

    @property
    def digits(self) -> int:
        """How many significant digits a loss has."""
        return 17 if self.dtype == "float64" else 7

    def declared(self) -> dict[str, Any]:
        """Return all but the probes, which change nothing."""
        return {name: what for name, what in super().declared().items() if name != "probes"}

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes on one core."""
        pace = paces[self.network.name] * _DEARNESS[self.recipe.norm]
        size = 0.5 + 0.5 * self.batch_size / 60
        looks = len(self.probes) * math.log(max(self.steps, 2), self.growth)
        return pace * size * (1.3 * self.steps + 8 * looks) + 0.02

    def answered_by(self, outcome: Outcome) -> bool:
        """Tell whether an outcome has what all the probes of this run saw."""
        assert isinstance(outcome, Result)
        return all(probe_name(probe) in outcome.observed for probe in self.probes)

    def united(self, other: Run) -> Run:
        """Return the run with the probes of both."""
        return replace(self, probes=tuple(dict.fromkeys([*self.probes, *other.probes])))

    def broken(self, reason: str) -> Result:
        """Return the result of a run that broke off before its first step."""
        return Result(reason=reason, observed={probe_name(probe): [] for probe in self.probes})

    def perform(self, data_set: DataSet) -> Result:
        """Train."""
        return train(self, data_set)

    def __str__(self) -> str:
        recipe = self.recipe
        words = [
            self.network.name,
            recipe.norm,
            f"{recipe.place} the activation" if recipe.place != "before" else "",
            f"dropout {recipe.dropout}" if recipe.dropout else "",
            f"gamma and beta {recipe.affine}" if recipe.affine != "trained" else "",
            recipe.initialization,
            f"momentum {recipe.momentum:g}" if recipe.momentum != 0.1 else "",
            f"groups of {recipe.group}" if recipe.norm == "ghost" else "",
            "inputs first" if recipe.first else "",
            self.treatment.__name__.strip("_").replace("_", " ") if self.treatment else "",
            f"{self.examples} examples" if self.examples else "",
            f"batches of {self.batch_size}" if self.batch_size != 60 else "",
            f"rate {self.learning_rate:g}",
            f"seed {self.seed}",
            self.dtype if self.dtype != "float32" else "",
        ]
        return ", ".join(word for word in words if word)


def train(run: Run, data_set: DataSet) -> Result:
    """Train one network, on one thread.

    Args:
        run: What is trained, and how.
        data_set: What it is trained on.

    Returns:
        Its result. A loss that is not finite ends the run, and is the result's reason.
    """
    start = time.perf_counter()
    dtype: torch.dtype = getattr(torch, run.dtype)
    data_set = _prepared(data_set, run.treatment, run.examples)
    held_out = some(data_set.test_inputs, data_set.test_labels, dtype)
    trained = some(data_set.train_inputs, data_set.train_labels, dtype)
    losses: list[float] = []
    steps: list[int] = []
    accuracies: list[float] = []
    observed: dict[str, list[Any]] = {probe_name(probe): [] for probe in run.probes}
    failed: dict[str, str] = {}
    looked = -1
    with one_thread(), torch.random.fork_rng(devices=[]), events.writer(str(run)) as writer:
        model = build(run.network, run.recipe, data_set.shape, data_set.classes, run.seed)
        model.to(dtype)
        torch.manual_seed(run.seed)  # for dropout
        for batch in batches(data_set, run.batch_size, run.seed, dtype):
            taken = len(losses)
            last = taken == run.steps
            if run.probes and (last or taken >= looked * run.growth):
                looked = max(taken, 1)
                look = (run.learning_rate, batch, held_out, trained, data_set)
                _look(run.probes, State(model, taken, last, *look), observed, failed)
            if last:
                break
            loss = step(model, *batch, run.learning_rate)
            if not math.isfinite(loss):
                break
            losses.append(loss)
            if len(losses) in (run.steps, next_evaluation(steps)):
                steps.append(len(losses))
                accuracies.append(accuracy(model, *held_out))
                writer.add(len(losses), loss=loss, held_out_accuracy=accuracies[-1])
        whole = len(losses) == run.steps
        ends = [evaluate(model, *examples) for examples in (trained, held_out)] if whole else []
    return Result(
        losses=losses,
        steps=steps,
        accuracies=accuracies,
        train_accuracy=ends[0][1] if ends else 0.0,
        train_loss=_finite(ends[0][0]) if ends else 0.0,
        test_loss=_finite(ends[1][0]) if ends else 0.0,
        observed=observed,
        failed=failed,
        seconds=time.perf_counter() - start,
        reason="" if whole else f"the loss was {loss} at step {len(losses) + 1}",
    )


def _look(
    probes: tuple[Probe, ...],
    state: State,
    observed: dict[str, list[Any]],
    failed: dict[str, str],
) -> None:
    """Let the probes look, without a trace in the training; one that fails stops nothing else."""
    with torch.random.fork_rng(devices=[]):
        for name, probe in ((probe_name(probe), probe) for probe in probes):
            if name in failed:
                continue
            try:
                seen = probe(state)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            with suppress(ValueError):  # what is not finite is as if there had been nothing to see
                json.dumps(seen, allow_nan=False)
                if seen is not None:
                    observed[name].append([state.step, seen])


def _prepared(data_set: DataSet, treatment: Treatment | None, examples: int) -> DataSet:
    """Treat a data set, and keep as many examples as were asked for, the same ones every time."""
    if treatment is not None:
        data_set = treatment(data_set)
    if not 0 < examples < len(data_set.train_labels):
        return data_set
    chosen = np.random.default_rng(0).permutation(len(data_set.train_labels))[:examples]
    return replace(
        data_set,
        train_inputs=data_set.train_inputs[chosen],
        train_labels=data_set.train_labels[chosen],
    )


def _finite(loss: float) -> float:
    """Return a loss that JSON can hold."""
    return min(loss, 1e30) if loss == loss else 1e30
