"""Plain gradient descent, piece by piece: batches, steps, evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.study.data import DataSet

Batch: TypeAlias = tuple[Tensor, Tensor]

_GROWTH = 1.1  # a network is evaluated each time that its steps have grown by this factor
_HELD_OUT = 2000  # evaluations look at so many examples at the most: enough to see one percent


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
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():  # torch.optim.SGD does the same, after an import of more than a second
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=learning_rate)
    return loss.item()


def batches(
    data_set: DataSet, batch_size: int, seed: int, dtype: torch.dtype = torch.float32
) -> Iterator[Batch]:
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


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of examples that a network in training has right when it is evaluated."""
    return evaluate(model, x, y)[1]


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy of a network in training when it is evaluated."""
    model.eval()
    with torch.no_grad():
        output = model(x)
    model.train()
    right = int((output.argmax(1) == y).sum())
    return cross_entropy(output, y).item(), right / len(y)


def some(inputs: np.ndarray, labels: np.ndarray, dtype: torch.dtype) -> Batch:
    """Choose the examples of an evaluation, always the same ones."""
    chosen = np.random.default_rng(0).permutation(len(labels))[:_HELD_OUT]
    return _tensors(inputs[chosen], labels[chosen], dtype)


def _tensors(inputs: np.ndarray, labels: np.ndarray, dtype: torch.dtype) -> Batch:
    return torch.from_numpy(inputs).to(dtype), torch.from_numpy(labels)
