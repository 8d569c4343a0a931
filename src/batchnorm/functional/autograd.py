"""The autograd seam: the whole layer as one node of the graph, and what its backward pass is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.functional.surroundings import is_traced_or_transformed, is_transformed
from batchnorm.kernels import DIFFERENTIABLE, Backend, Form, Given, Gradients, Needs
from batchnorm.moments import Moments


def is_recorded(*inputs: Tensor | None) -> bool:
    """Return whether autograd records what is computed from these inputs."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)


class BatchNormNode(torch.autograd.Function):
    """The whole layer, which keeps x and two numbers a channel.

    It returns y and the batch's moments, or None where running ones normalized it. Nothing that is
    kept is a buffer, so that a later forward may update those.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        form: Form,
        running: tuple[Tensor, Tensor] | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Moments | None]:
        """Return y, and the moments."""
        y, moments, mean, inverse_std = backend.forward(
            x, weight, bias, residual, mask, form, running
        )
        ctx.backend, ctx.form = backend, form
        count = None if moments is None else moments.count
        ctx.count = None if isinstance(count, Tensor) else count
        ctx.save_for_backward(
            count if isinstance(count, Tensor) else None,
            x,
            mean,
            inverse_std,
            weight,
            bias,
            residual if form.activation else None,  # z's alone
            mask,
        )
        return y, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of what `forward` took."""
        count, *tensors = ctx.saved_tensors
        count = ctx.count if count is None else count
        backend = DIFFERENTIABLE if is_traced_or_transformed() else ctx.backend
        needs = Needs._make(ctx.needs_input_grad[3:7])
        found = gradients(backend.backward, dy, Given._make([*tensors, ctx.form]), count, needs)
        return None, None, None, *found, None


def gradients(
    backward: Callable[[Tensor, Given, Tensor | float | None, Needs], Gradients],
    dy: Tensor,
    given: Given,
    count: Tensor | float | None,
    needs: Needs,
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
    """
    again = torch.is_grad_enabled()  # a gradient of this gradient is wanted: all depends on x
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # by is_grads_batched=True
    if again or batched or is_transformed():
        backward = DIFFERENTIABLE.backward
    if again and count is not None:
        form = given.form
        moments = DIFFERENTIABLE.collect(given.x, given.mask, form)
        inverse_std = moments.inverse_std(form.eps, form.correction)
        given = given._replace(mean=moments.mean, inverse_std=inverse_std)
    found = backward(dy, given, count, needs)
    # autograd gives each the type of its input
    return Gradients._make(g if need else None for g, need in zip(found, needs, strict=True))
