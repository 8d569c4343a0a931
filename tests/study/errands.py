"""Tasks for the tests of the engine and the store, that do what they are told."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from batchnorm.study import events
from batchnorm.study.tasks import Outcome, Task


@dataclass(frozen=True, kw_only=True)
class Note(Outcome):
    """Which process did it, and what it saw of the data."""

    process: int = 0
    values: list[float] = field(default_factory=list)
    place: int = 0  # of the data in memory
    mapped: bool = False


@dataclass(frozen=True)
class Errand(Task[Note]):
    """A task that does what its name says, and is told the rest by a path."""

    kind = "errand"
    outcome = Note

    what: str
    path: str = ""

    def perform(self, data_set):
        match self.what.split()[0]:
            case "fail":
                raise RuntimeError("as it was told\nat length")
            case "exit":
                sys.exit("as it was told")
            case "nan":
                return Note(values=[float("nan")])
            case "die":
                self.die()
            case "stumble":
                if not Path(self.path).exists():
                    Path(self.path).touch()
                    self.die()
            case "look":  # how many arrays a worker of Dask holds
                import distributed

                held = distributed.get_worker().data.values()
                return Note(values=[sum(isinstance(value, np.ndarray) for value in held)])
            case "wait":
                time.sleep(0.2)
            case "write":
                with events.writer(str(self)) as writer:
                    writer.add(1, loss=0.5)
        inputs = data_set.train_inputs
        return Note(
            process=os.getpid(),
            values=[float(np.sum(values)) for values in (inputs, data_set.test_labels)],
            place=inputs.ctypes.data,
            mapped=isinstance(inputs, np.memmap),
        )

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def __str__(self):
        return self.what


class Lonely(Errand):
    """The same, but only when nothing else is done."""

    kind = "lonely errand"
    alone = True


@dataclass(frozen=True)
class Asking(Errand):
    """An errand that may ask for more than an equal one."""

    kind = "asking errand"

    asked: frozenset[float] = field(default=frozenset(), compare=False)

    def declared(self):
        declared = super().declared()
        del declared["asked"]
        return declared

    def answered_by(self, outcome):
        return self.asked <= {*outcome.values}

    def united(self, other):
        return Asking(self.data, self.what, asked=self.asked | other.asked)

    def perform(self, data_set):
        return Note(values=sorted(self.asked))
