"""Plain calls: those in which nothing has to be converted, copied or refused, which are most.

Every question that Python asks of a tensor costs about as much as the arithmetic of a small batch.
So a plain call is one call of C++, which checks what it is given by itself; what it does not find
plain, it leaves alone, and the call goes the long way, with its checks and its messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.kernels import native
from batchnorm.kernels.activations import ActivationLike
from batchnorm.kernels.contract import Form
from batchnorm.kernels.dispatch import NATIVE, is_served_by_native

_CLASSES = (Tensor, Parameter)


class Plain:
    """What a plain call found, for its backward pass.

    Attributes:
        backend: The kernels in C++.
        mask: None.
        y: The result, on its way through autograd.
    """

    __slots__ = ("_batch", "_found", "y")

    backend = NATIVE
    mask = None
    y: Tensor | None

    def __init__(self, found: Any, batch: native.Batch) -> None:
        self._batch, self._found = batch, found

    @property
    def form(self) -> Form:
        """What does not change from call to call."""
        return self._batch.form

    @property
    def count(self) -> float | None:
        """The number of values per channel, or None if the batch's moments did not normalize."""
        found = self._found
        return float(found.count) if found.of_batch else None

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and inverse_std, (C,)."""
        mean, inverse_std = self._found.tensors()
        return mean, inverse_std

    def lead(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float | None,
        num_batches_tracked: Tensor | None,
    ) -> None:
        """Move the running statistics that `forward` was given towards the batch's moments."""
        rate = math.nan if momentum is None else momentum
        self._found.lead(running_mean, running_var, rate, num_batches_tracked)
        native.mark_written(running_mean, running_var, num_batches_tracked)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...] | None:
        """Return the gradients that are wanted, or None if dy does not lie in memory as x does."""
        if dy.is_neg():
            return None
        plan, threads = self._batch.plan, torch.get_num_threads()
        try:
            found: tuple[Tensor | None, ...] | None = plan.backward_plain(
                self._found, threads, x, dy, residual, weight, bias, *needs
            )
        except MemoryError:
            return None
        return found


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    channel_dim: int,
    eps: float,
    correction: float,
    activation: ActivationLike,
) -> tuple[Tensor, Plain] | None:
    """Return y and what else was found, or None if the call is not plain. Nothing is updated.

    Args:
        x: The batch.
        residual: Added before the activation, or None.
        weight: gamma, (C,), or None.
        bias: beta, (C,), or None.
        running_mean: The running mean, (C,), or None; in training it can follow the batch's.
        running_var: The running variance, likewise.
        num_batches_tracked: The number of updates, a scalar, or None.
        training: Whether the batch's own moments normalize it.
        channel_dim: The channels' dimension.
        eps: Added to the variance.
        correction: The variance that normalizes is divided by m - correction.
        activation: As a user names it.

    Raises:
        ValueError: There is no such activation.
    """
    if type(x) not in _CLASSES or not x.is_cpu or x.layout is not torch.strided or x.is_neg():
        return None
    if NATIVE.available() is not None or not is_served_by_native():
        return None
    if residual is not None and (type(residual) not in _CLASSES or residual.is_neg()):
        return None
    given = (weight, bias) if training else (weight, bias, running_mean, running_var)
    for values in given:
        if values is not None and (type(values) not in _CLASSES or values.is_neg()):
            return None
    if training and not native.are_buffers(running_mean, running_var, num_batches_tracked):
        return None
    try:
        batch = native.batch_of(
            x.shape, x.stride(), x.dtype, channel_dim, eps, correction, activation
        )
    except TypeError:  # something that has no hash
        return None
    if batch is None or not batch.dense:
        return None
    try:
        found = batch.plan.forward_plain(
            torch.get_num_threads(), x, residual, weight, bias, running_mean, running_var,
            num_batches_tracked, bool(training),
        )  # fmt: skip
    except MemoryError:  # the long way may find some
        return None
    if found is None:
        return None
    y, statistics = found
    return y, Plain(statistics, batch)
