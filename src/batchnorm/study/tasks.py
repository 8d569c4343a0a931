"""What a study does, declared as data: a task is named by a hash of what its outcome depends on."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch

import batchnorm
from batchnorm.kernels import backends
from batchnorm.study.data import DataSet

FORMAT = 2  # raise it when the same declaration would lead to another outcome

VERSIONS: dict[str, str] = {}  # of the modules of extensions, by name; workers are told them


class StudyError(Exception):
    """A study cannot begin or go on; the message says in one line why, and the way out."""


class NotMeasured(Exception):
    """A part of a claim cannot be measured; the message says why, as a sentence."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a task.

    Attributes:
        reason: Why the task ended before its time; empty when all went well.
    """

    reason: str = ""

    def joined(self, earlier: Self) -> Self:
        """Return this outcome with what an earlier one of the same task has besides."""
        return self


O_co = TypeVar("O_co", bound=Outcome, covariant=True)


@dataclass(frozen=True)
class Task(ABC, Generic[O_co]):
    """One thing to do with a data set; a subclass adds what else its outcome depends on.

    Attributes:
        data: The `fingerprint` of the data set.
    """

    kind: ClassVar[str]
    outcome: ClassVar[type[Outcome]]
    alone: ClassVar[bool] = False  # whether nothing else may run at the same time

    data: str

    @property
    def key(self) -> str:
        """The name of the task: it changes with all that the outcome depends on."""
        declared = {"format": FORMAT, "made by": _makers(), "kind": self.kind, **self.declared()}
        canonical = json.dumps(declared, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def digits(self) -> int:
        """How many significant digits of its numbers are worth keeping."""
        return 9  # what float32 can hold

    def declared(self) -> dict[str, Any]:
        """Return what the outcome depends on, as JSON."""
        return {field.name: declared(getattr(self, field.name)) for field in fields(self)}

    def seconds(self, paces: Mapping[str, float]) -> float:
        """Estimate how long it takes on one core.

        Args:
            paces: The seconds of a step of training, by the name of the network.
        """
        return 0.5

    def answered_by(self, outcome: Outcome) -> bool:
        """Tell whether an outcome that is kept has all that this task asks for."""
        return True

    def united(self, other: Self) -> Self:
        """Return a task that asks for what this and an equal one ask for."""
        return self

    def broken(self, reason: str) -> Outcome:
        """Return the outcome of the task when it broke off before there was anything else."""
        return self.outcome(reason=reason)

    @abstractmethod
    def perform(self, data_set: DataSet) -> O_co:
        """Do it."""

    @abstractmethod
    def __str__(self) -> str:
        """Say in a few words what this is."""


def fingerprint(data_set: DataSet) -> str:
    """Name a data set by its content, so that changed files are new data.

    Example:
        >>> from batchnorm.study.data import load
        >>> fingerprint(load("digits")) == fingerprint(load("digits"))
        True
    """
    digest = hashlib.sha256()
    for values in (
        data_set.train_inputs,
        data_set.train_labels,
        data_set.test_inputs,
        data_set.test_labels,
    ):
        digest.update(f"{values.dtype.str}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:16]


def declared(value: Any) -> Any:
    """Turn a field into JSON that names it: a function by its place, and its file's version."""
    if hasattr(value, "declared"):
        return value.declared()
    if is_dataclass(value):
        return {field.name: declared(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [declared(item) for item in value]
    if isinstance(value, partial):
        return [declared(value.func), declared(value.args), sorted(value.keywords.items())]
    if callable(value):
        if not hasattr(value, "__qualname__"):
            raise StudyError(f"{value!r}: expected a function, by whose place its runs are named")
        return f"{value.__module__}.{value.__qualname__}{version(value)}"
    return value


def version(function: Any) -> str:
    """Return the version of the file that a function is from; empty for this package's own.

    The version of the package stands for its own files; an extension has one of its own.
    """
    return VERSIONS.get(function.__module__, "")


@cache
def _makers() -> dict[str, Any]:
    """What computes here: the versions, and the kernels, whose times differ."""
    serving = [backend.name for backend in backends() if backend.available() is None]
    return {"batchnorm": batchnorm.__version__, "torch": torch.__version__, "kernels": serving}
