"""The autograd seam: the whole layer as one node of the graph, and what its backward pass is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchnorm.functional.surroundings import is_traced_or_transformed, is_transformed
from batchnorm.kernels import DIFFERENTIABLE, Backend, Form, Found, Given, Gradients, Needs, steps
from batchnorm.kernels.plain import Plain
from batchnorm.kernels.steps import Correction, Pool


def is_recorded(*inputs: Tensor | None) -> bool:
    """Return whether autograd records what is computed from these inputs."""
    if torch.is_grad_enabled():
        for v in inputs:
            if v is not None and v.requires_grad:
                return True
    return False


class Call:
    """What a call of the layer found, and with what, beside the inputs of the graph.

    A plain call has a `Plain` in its place, with the same attributes.
    """

    __slots__ = ("_statistics", "backend", "correction", "count", "form", "mask", "pool", "y")

    y: Tensor | None

    def __init__(
        self,
        found: Found,
        backend: Backend,
        form: Form,
        mask: Tensor | None,
        pool: Pool | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.y, self.backend, self.form, self.mask = found.y, backend, form, mask
        self.pool, self.correction = pool, correction
        self.count = None if found.moments is None else found.moments.count
        self._statistics = found.mean, found.inverse_std

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and inverse_std, (C,), or those of groups, (G, C)."""
        return self._statistics


class BatchNormNode(torch.autograd.Function):
    """The whole layer, which keeps x and two numbers a channel.

    Nothing that is kept is a buffer, so that a later forward may update those. y was computed
    before, and what is no input of the graph comes in the `Call`, for every argument of a node
    takes its time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call | Plain,
    ) -> Tensor:
        """Return y."""
        if call.form.activation is None:
            residual = None  # z is made of it, and nothing else
        if call.mask is None:
            ctx.save_for_backward(x, weight, bias, residual)
        else:
            ctx.save_for_backward(x, weight, bias, residual, call.mask)
            call.mask = None  # autograd keeps it, and sees whether it changes
        y, call.y = call.y, None
        assert y is not None
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what `forward` took."""
        call: Call | Plain = ctx.call
        x, weight, bias, residual, *masks = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        watched = is_traced_or_transformed()
        if isinstance(call, Plain) and not watched and not torch.is_grad_enabled():
            found = call.backward(dy, x, weight, bias, residual, needs)
            if found is not None:
                return *found, None
        mask = masks[0] if masks else None
        given = Given(x, *call.statistics(), weight, bias, residual, mask, call.form)
        backend = DIFFERENTIABLE if watched else call.backend
        between = call.pool, call.correction
        if between == (None, None):
            backward = backend.backward
        else:
            backward = partial(steps.backward, backend, pool=call.pool, correction=call.correction)
        found = gradients(backward, dy, given, call.count, Needs._make(needs), *between)
        return *found, None


# `BatchNormNode.apply` looks for transforms of `torch.func`, and for tensors of those that ended.
# That takes as long as the rest of it, and a plain call has neither.
apply_plainly: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormNode).apply


def gradients(
    backward: Callable[[Tensor, Given, Tensor | float | None, Needs], Gradients],
    dy: Tensor,
    given: Given,
    count: Tensor | float | None,
    needs: Needs,
    pool: Pool | None = None,
    correction: Correction | None = None,
) -> Gradients:
    """Return the gradients that are wanted, and no others.

    They come from `backward`, which is a backend's, unless they are to be differentiated or mapped
    over themselves: then they are made of plain operations.

    Args:
        backward: Takes the four other arguments.
        dy: The gradient of y.
        given: What y was computed from.
        count: Of the moments; None if those do not depend on x.
        needs: Which gradients are wanted.
        pool: What else was normalized together with the batch.
        correction: What its moments were corrected by.
    """
    again = torch.is_grad_enabled()  # a gradient of this gradient is wanted: all depends on x
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # by is_grads_batched=True
    if again or batched or is_transformed():
        backward = partial(steps.backward, DIFFERENTIABLE, pool=pool, correction=correction)
    if again and count is not None:
        form = given.form
        moments = DIFFERENTIABLE.collect(given.x, given.mask, form)
        moments = moments if pool is None else pool.moments(moments)
        mean, inverse_std = steps.statistics(moments, form, correction)
        given = given._replace(mean=mean, inverse_std=inverse_std)
    found = backward(dy, given, count, needs)
    # autograd gives each the type of its input
    return Gradients._make(g if need else None for g, need in zip(found, needs, strict=True))
