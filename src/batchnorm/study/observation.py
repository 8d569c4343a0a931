"""What is seen of a training run: by the probes on the way, and in its result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn

from batchnorm.study.data import DataSet
from batchnorm.study.descent import Batch
from batchnorm.study.tasks import NotMeasured, Outcome, version


@dataclass(frozen=True)
class State:
    """What a probe sees of a run, at the start, now and then, and at the end.

    A probe leaves the model as it is; what it changes, it changes in a `copy`.

    Attributes:
        model: The network, in training.
        step: How many steps have been taken.
        last: Whether the run is at its end.
        rate: The learning rate.
        batch: Inputs and labels of the step that is next, or at the end of the last one.
        held_out: Inputs and labels of examples to try.
        trained: Inputs and labels of as many examples to train on.
        data_set: All examples.
    """

    model: nn.Module
    step: int
    last: bool
    rate: float
    batch: Batch
    held_out: Batch
    trained: Batch
    data_set: DataSet

    def copy(self) -> nn.Module:
        """Return a network like this one, to be changed at will."""
        return copy.deepcopy(self.model)


Probe: TypeAlias = Callable[[State], Any]  # returns finite JSON, or None for nothing to see
Treatment: TypeAlias = Callable[[DataSet], DataSet]


def probe_name(probe: Probe) -> str:
    """Return what a result calls a probe: an extension's changes with its file."""
    return f"{probe.__name__}{version(probe)}"


@dataclass(frozen=True, kw_only=True)
class Result(Outcome):
    """What came of a run.

    Attributes:
        losses: The loss of every step, before the step was taken.
        steps: After how many steps the network was evaluated.
        accuracies: The share of the held-out examples that it then had right.
        train_accuracy: The share of the training examples that it had right at the end.
        train_loss: The loss on them at the end, in evaluation.
        test_loss: The loss on the held-out examples at the end.
        observed: By the name of a probe, what it saw: pairs of a step and JSON.
        failed: By the name of a probe, what went wrong in it.
        seconds: How long all of it took.
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    train_accuracy: float = 0.0
    train_loss: float = 0.0
    test_loss: float = 0.0
    observed: Mapping[str, list[Any]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def joined(self, earlier: Result) -> Result:
        """Return the result with what other probes saw when the same run was done before.

        If this one broke off and that one did not, it was not for what the run is: that one stays.
        """
        if self.reason and not earlier.reason:
            lost = {name: self.reason for name in self.observed if name not in earlier.observed}
            seen: dict[str, list[Any]] = {name: [] for name in lost}
            return replace(
                earlier,
                observed={**seen, **earlier.observed},
                failed={**earlier.failed, **lost},
            )
        return replace(
            self,
            observed={**earlier.observed, **self.observed},
            failed={**earlier.failed, **self.failed},
        )

    def seen(self, probe: Probe) -> list[Any]:
        """Return what a probe saw, in the order of the steps.

        Raises:
            NotMeasured: The probe failed.
        """
        return [value for _, value in self._looks(probe)]

    def at(self, probe: Probe) -> list[int]:
        """Return after how many steps it saw that.

        Raises:
            NotMeasured: The probe failed.
        """
        return [step for step, _ in self._looks(probe)]

    def _looks(self, probe: Probe) -> list[Any]:
        if reason := self.failed.get(probe_name(probe)):
            raise NotMeasured(f"Looking failed ({probe.__name__}): {reason}.")
        return self.observed[probe_name(probe)]
