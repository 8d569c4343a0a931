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
        view = self._batch.view
        return view.N * view.S if self._found.of_batch else None

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and inverse_std, (C,)."""
        mean, inverse_std = (torch.empty_like(self._batch.numbers) for _ in range(2))
        self._found.copy(mean.data_ptr(), inverse_std.data_ptr())
        return mean, inverse_std

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...] | None:
        """Return the gradients that are wanted, in the order of `needs`; None if dy is odd."""
        if dy.is_neg():
            return None
        found: tuple[Tensor | None, ...] | None = self._batch.plan.backward_plain(
            self._found, torch.get_num_threads(), x, dy, residual, weight, bias, *needs
        )
        return found


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    channel_dim: int,
    eps: float,
    correction: float,
    activation: ActivationLike,
) -> tuple[Tensor, Plain] | None:
    """Return y and what else was found, or None, having done nothing, if the call is not plain.

    Args:
        x: The batch.
        residual: Added before the activation, or None.
        weight: gamma, (C,), or None.
        bias: beta, (C,), or None.
        running_mean: The running mean, (C,), or None; in training it follows the batch's.
        running_var: The running variance, likewise.
        training: Whether the batch's own moments normalize it.
        momentum: How much a batch counts in the running statistics; None for the plain average.
        num_batches_tracked: The number of updates, a scalar, updated; or None.
        channel_dim: The channels' dimension.
        eps: Added to the variance.
        correction: The variance that normalizes is divided by m - correction.
        activation: As a user names it.

    Raises:
        ValueError: There is no such activation.
    """
    if type(x) not in _CLASSES or x.layout is not torch.strided or x.is_neg():
        return None
    if NATIVE.available() is not None or not is_served_by_native():
        return None
    if residual is not None and residual.is_neg():
        return None
    try:
        batch = native.batch_of(
            x.shape, x.stride(), x.dtype, channel_dim, eps, correction, activation
        )
    except TypeError:  # something that has no hash
        return None
    if batch is None or not batch.dense:
        return None
    follower = running_mean if training else None
    if follower is not None and (follower.is_inference() or follower.requires_grad):
        return None
    found = batch.plan.forward_plain(
        torch.get_num_threads(), x, residual, weight, bias, running_mean, running_var, training,
        math.nan if momentum is None else momentum, num_batches_tracked,
    )  # fmt: skip
    if found is None:
        return None
    if follower is not None and running_var is not None:
        written: tuple[Tensor, ...] = (follower, running_var)
        if num_batches_tracked is not None:
            written += (num_batches_tracked,)
        torch.autograd.graph.increment_version(written)
    y, statistics = found
    return y, Plain(statistics, batch)
