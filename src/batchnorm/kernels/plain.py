"""Plain calls: those in which nothing has to be converted, copied or refused, which are most.

Every question that Python asks of a tensor costs about as much as the arithmetic of a small batch.
So a plain call is one call of C++, which checks what it is given by itself; what it does not find
plain, it leaves alone, and the call goes the long way, with its checks and its messages.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.kernels import native
from batchnorm.kernels.contract import Form, Gradients, Needs
from batchnorm.kernels.dispatch import NATIVE, is_served_by_native

_CLASSES = (Tensor, Parameter)
_ready: bool = native.reads_tensors()


class Plain:
    """What a plain call found, for its backward pass.

    Attributes:
        y: The result; None once somebody took it.
        form: What does not change from call to call.
    """

    __slots__ = ("_batch", "_found", "backend", "form", "mask", "y")

    y: Tensor | None

    def __init__(self, y: Tensor, batch: native.Batch, found: Any, form: Form) -> None:
        self.y, self.backend, self.form, self.mask = y, NATIVE, form, None
        self._batch, self._found = batch, found

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
        needs: Needs,
    ) -> Gradients | None:
        """Return the gradients that are wanted, or None if dy is not plain."""
        batch = self._batch
        through_z = needs.residual and self.form.activation is not None
        dx = native.output_like(x, batch) if needs.x or through_z else None
        dresidual = native.output_like(x, batch) if through_z else None
        dweight = native.gradient_like(weight, batch) if needs.weight else None
        dbias = native.gradient_like(bias, batch) if needs.bias else None
        if dy.is_neg() or not batch.plan.backward_plain(
            self._found, torch.get_num_threads(), x, dy, dx, residual, dresidual, weight, bias,
            dweight, dbias,
        ):  # fmt: skip
            return None
        if needs.residual and not through_z:
            dresidual = dy
        return Gradients(dx if needs.x else None, dweight, dbias, dresidual)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    training: bool,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    form: Form,
) -> Plain | None:
    """Return y and what else was found, or None, having done nothing, if the call is not plain.

    Args:
        x: The batch.
        residual: Added before the activation, or None.
        weight: gamma, (C,), or None.
        bias: beta, (C,), or None.
        running: Mean and variance: they normalize, or in training follow the batch's moments.
        training: Whether the batch's own moments normalize it.
        momentum: How much a batch counts in the running statistics; None for the plain average.
        num_batches_tracked: The number of updates, a scalar, updated; or None.
        form: What does not change from call to call.
    """
    if not _ready or type(x) not in _CLASSES or not x.is_cpu or x.layout is not torch.strided:
        return None
    if not is_served_by_native() or x.dtype not in native.TYPES:
        return None
    if x.is_neg() or (residual is not None and residual.is_neg()):
        return None
    batch = native.batch_of(x.shape, x.stride(), x.dtype, form)
    if batch is None or not batch.dense:
        return None
    mean, var = running
    follows = training and mean is not None
    if follows and (mean.is_inference() or mean.requires_grad):
        return None
    y = native.output_like(x, batch)
    found = batch.plan.forward_plain(
        torch.get_num_threads(), x, y, residual, weight, bias, mean, var, training,
        math.nan if momentum is None else momentum, num_batches_tracked,
    )  # fmt: skip
    if found is None:
        return None
    if follows:
        written = (mean, var) if num_batches_tracked is None else (mean, var, num_batches_tracked)
        torch.autograd.graph.increment_version(written)
    return Plain(y, batch, found, form)
