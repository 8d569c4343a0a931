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
from batchnorm.kernels.memory import are_buffers
from batchnorm.moments import Moments

_CLASSES = (Tensor, Parameter)


class Plain:
    """What a plain call found, for its backward pass.

    Attributes:
        backend: The kernels in C++.
        mask: None.
        pool: None.
        correction: None.
        y: The result, on its way through autograd.
    """

    __slots__ = ("_batch", "_found", "y")

    backend = NATIVE
    mask = None
    pool = None
    correction = None
    y: Tensor | None

    def __init__(self, found: Any, batch: native.Batch) -> None:
        self._batch, self._found = batch, found

    @property
    def form(self) -> Form:
        """What does not change from call to call."""
        return self._batch.form

    @property
    def count(self) -> Tensor | float | None:
        """The number of values per channel, or None if the batch's moments did not normalize."""
        found = self._found
        if not found.of_batch:
            return None
        counts: list[float] = found.counts
        if self.form.ghost_size is None:
            return counts[0]
        return torch.tensor(counts, dtype=torch.float64, device="cpu").unsqueeze(1)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and inverse_std, (C,), or those of groups, (G, C)."""
        mean, inverse_std = self._found.tensors()
        if self.form.ghost_size is not None and mean.ndim == 1:
            return mean.unsqueeze(0), inverse_std.unsqueeze(0)
        return mean, inverse_std

    def moments(self) -> Moments:
        """Return the moments of the batch, which `forward` was to keep."""
        return Moments(*self._found.moments())

    def lead(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float | None,
        num_batches_tracked: Tensor | None,
    ) -> bool:
        """Move running statistics towards the batch's moments, which `forward` was to keep.

        Returns False, and does nothing, if these tensors have to be converted first.
        """
        if not are_buffers(running_mean, running_var, num_batches_tracked):
            return False
        rate = math.nan if momentum is None else momentum
        moved: bool = self._found.lead(running_mean, running_var, rate, num_batches_tracked)
        if moved:
            native.mark_written(running_mean, running_var, num_batches_tracked)
        return moved

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
    training: bool,
    track: bool,
    channel_dim: int,
    eps: float,
    correction: float,
    activation: ActivationLike,
    ghost_size: int | None,
) -> tuple[Tensor, Plain] | None:
    """Return y and what else was found, or None if the call is not plain. Nothing is updated.

    Args:
        x: The batch.
        residual: Added before the activation, or None.
        weight: gamma, (C,), or None.
        bias: beta, (C,), or None.
        running_mean: The running mean, (C,), which normalizes where the batch's does not; or None.
        running_var: The running variance, likewise.
        training: Whether the batch's own moments normalize it.
        track: Whether running statistics will follow those moments.
        channel_dim: The channels' dimension.
        eps: Added to the variance.
        correction: The variance that normalizes is divided by m - correction.
        activation: As a user names it.
        ghost_size: Number of examples in a group; None for one group of all.

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
    try:
        batch = native.batch_of(
            x.shape, x.stride(), x.dtype, channel_dim, eps, correction, activation, ghost_size
        )
    except TypeError:  # something that has no hash
        return None
    if batch is None or not batch.dense:
        return None
    try:
        found = batch.plan.forward_plain(
            torch.get_num_threads(), x, residual, weight, bias, running_mean, running_var,
            bool(training), track,
        )  # fmt: skip
    except MemoryError:  # the long way may find some
        return None
    if found is None:
        return None
    y, statistics = found
    return y, Plain(statistics, batch)
