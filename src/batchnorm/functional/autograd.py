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
    if torch.is_grad_enabled():
        for v in inputs:
            if v is not None and v.requires_grad:
                return True
    return False


class Call:
    """What a call of the layer was made with, and what it found, beside the inputs of the graph."""

    __slots__ = ("backend", "count", "form", "inverse_std", "mask", "mean", "moments", "running")

    mean: Tensor
    inverse_std: Tensor
    count: Tensor | float | None
    moments: Moments | None

    def __init__(
        self,
        backend: Backend,
        form: Form,
        running: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> None:
        self.backend, self.form, self.running, self.mask = backend, form, running, mask


class BatchNormNode(torch.autograd.Function):
    """The whole layer, which keeps x and two numbers a channel.

    Nothing that is kept is a buffer, so that a later forward may update those. What is no input of
    the graph goes in and out by the `Call`, for every argument of a node takes its time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Return y."""
        form, running = call.form, call.running
        y, moments, call.mean, call.inverse_std = call.backend.forward(
            x, weight, bias, residual, call.mask, form, running
        )
        call.moments, call.running = moments, None
        call.count = None if moments is None else moments.count
        ctx.call = call
        kept = x, weight, bias, residual if form.activation else None  # z's alone
        ctx.save_for_backward(*kept if call.mask is None else (*kept, call.mask))
        call.mask = None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what `forward` took."""
        call: Call = ctx.call
        x, weight, bias, residual, *masks = ctx.saved_tensors
        mask = masks[0] if masks else None
        given = Given(x, call.mean, call.inverse_std, weight, bias, residual, mask, call.form)
        backend = DIFFERENTIABLE if is_traced_or_transformed() else call.backend
        needs = Needs._make(ctx.needs_input_grad[:4])
        return *gradients(backend.backward, dy, given, call.count, needs), None


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
