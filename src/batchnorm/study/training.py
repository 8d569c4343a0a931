"""One training run: declared as data, the same every time, and a result whatever happens in it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.study.data import DataSet
from batchnorm.study.networks import build
from batchnorm.study.tasks import Outcome, Task

_GROWTH = 1.1  # a network is evaluated each time that its steps have grown by this factor
_HELD_OUT = 2000  # evaluations look at so many examples at the most: enough to see one percent


@dataclass(frozen=True, kw_only=True)
class Result(Outcome):
    """What came of a run.

    Attributes:
        losses: The loss of every step, before the step was taken.
        steps: After how many steps the network was evaluated.
        accuracies: The share of the held-out examples that it then had right.
        seconds: How long all of it took.
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Run(Task[Result]):
    """A network trained by plain stochastic gradient descent, as in Ioffe & Szegedy (2015).

    Attributes:
        network: One of `NETWORKS`.
        norm: One of `NORMS`.
        learning_rate: The length of a step, in units of the gradient.
        seed: What the initial weights and the order of the examples are drawn by.
        steps: How many steps are taken.
        batch_size: Examples in a step.
        dtype: The type of the weights and the activations.
    """

    kind = "run"
    outcome = Result

    network: str
    norm: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int = 60
    dtype: str = "float32"

    @property
    def digits(self) -> int:
        """How many significant digits a loss has."""
        return 17 if self.dtype == "float64" else 9

    def perform(self, data_set: DataSet) -> Result:
        """Train."""
        return train(self, data_set)

    def __str__(self) -> str:
        name = f"{self.network}, {self.norm}, rate {self.learning_rate:g}, seed {self.seed}"
        return name if self.dtype == "float32" else f"{name}, {self.dtype}"


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
    held_out = np.random.default_rng(0).permutation(len(data_set.test_labels))[:_HELD_OUT]
    test = _tensors(data_set.test_inputs[held_out], data_set.test_labels[held_out], dtype)
    losses: list[float] = []
    steps: list[int] = []
    accuracies: list[float] = []
    with one_thread():
        model = build(run.network, run.norm, data_set.shape, data_set.classes, run.seed).to(dtype)
        for x, y in islice(batches(data_set, run.batch_size, run.seed, dtype), run.steps):
            loss = step(model, x, y, run.learning_rate)
            if not math.isfinite(loss):
                break
            losses.append(loss)
            if len(losses) in (run.steps, next_evaluation(steps)):
                steps.append(len(losses))
                accuracies.append(_accuracy(model, *test))
    return Result(
        losses=losses,
        steps=steps,
        accuracies=accuracies,
        seconds=time.perf_counter() - start,
        reason="" if len(losses) == run.steps else f"the loss was {loss} at step {len(losses) + 1}",
    )


def step(model: nn.Module, x: Tensor, y: Tensor, learning_rate: float) -> float:
    """Take one step of gradient descent.

    Args:
        model: The network, in training.
        x: A batch of inputs, shape (N, C, H, W).
        y: Its labels, shape (N,).
        learning_rate: The length of the step, in units of the gradient.

    Returns:
        The loss before the step.
    """
    parameters = list(model.parameters())
    loss = cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():  # torch.optim.SGD does the same, after an import of more than a second
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=learning_rate)
    return loss.item()


def batches(
    data_set: DataSet, batch_size: int, seed: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch after the other, without end.

    All have the same size, so the few examples that an epoch has left over are not seen in it.

    Args:
        data_set: Where the examples come from.
        batch_size: Examples in a batch; no more than there are.
        seed: What each epoch's order is drawn by.
        dtype: The type of the inputs.

    Yields:
        Inputs of shape (N, C, H, W) and labels of shape (N,).
    """
    generator = np.random.default_rng(seed)
    count = len(data_set.train_labels)
    while True:
        order = generator.permutation(count)
        for chosen in np.split(order, range(batch_size, count, batch_size)):
            if len(chosen) == min(batch_size, count):
                yield _tensors(data_set.train_inputs[chosen], data_set.train_labels[chosen], dtype)


def next_evaluation(steps: list[int]) -> int:
    """Return the step of the next evaluation: what is counted in steps is compared by factors.

    Example:
        >>> next_evaluation([]), next_evaluation([1]), next_evaluation([1, 2, 100])
        (1, 2, 110)
    """
    return max(steps[-1] + 1, int(steps[-1] * _GROWTH)) if steps else 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread inside: fastest for small networks, and fair side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tensors(inputs: np.ndarray, labels: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(inputs).to(dtype), torch.from_numpy(labels)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = int((model(x).argmax(1) == y).sum())
    model.train()
    return right / len(y)
