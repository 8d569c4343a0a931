"""Batch normalization as a function: the checks, the autograd seam, the running update."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from batchnorm import kernels
from batchnorm.functional import operators
from batchnorm.functional.autograd import BatchNormNode, Call, apply_plainly, is_recorded
from batchnorm.functional.checks import (
    OnSmallBatch,
    check_batch,
    check_inplace,
    check_momentum,
    check_on_small_batch,
)
from batchnorm.functional.surroundings import in_backward, is_compiling, is_traced_or_transformed
from batchnorm.kernels import DIFFERENTIABLE, Activation, ActivationLike, Form, native, plain
from batchnorm.moments import Moments

T = TypeVar("T", Tensor, Tensor | None)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: ActivationLike = None,
    correction: float = 0,
    channel_dim: int = 1,
    on_small_batch: OnSmallBatch = "error",
    inplace: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Normalize every channel of a batch: `torch.nn.functional.batch_norm`, and more.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var are the batch's own and the running ones follow them; otherwise the
    running ones normalize. A batch that is empty or not finite, and a recomputation under
    `torch.utils.checkpoint`, leave the running statistics as they are.

    Args:
        input: The batch x, real floating point, of any rank, with C channels along `channel_dim`.
        running_mean: The running mean, (C,), updated in place in training; or None.
        running_var: The running variance, (C,), likewise.
        weight: gamma, (C,); 1 if None.
        bias: beta, (C,); 0 if None.
        training: Whether the batch's own moments normalize it and are tracked.
        momentum: How much a batch counts in the running statistics:
            running = (1 - momentum) * running + momentum * batch. None, which needs
            `num_batches_tracked`, makes them the plain average over all batches.
        eps: Added to the variance, in its unit; positive in training.
        residual: Added before the activation; the shape of `input`.
        mask: The positions that are there: boolean, or weights >= 0 (a weight of 2 counts a
            position twice); any shape that broadcasts over the positions, which are all dimensions
            of `input` but the channels'. Only the moments are masked: every position is
            normalized. Where the weight is 0, values that are not finite are read as 0.
        activation: `"relu"`, `"leaky_relu"`, `"elu"`, `"silu"`, `"gelu"`, `"sigmoid"`, `"tanh"`, or
            a pair with the slope or alpha, as `("leaky_relu", 0.2)`.
        correction: The variance that normalizes is divided by m - correction.
        channel_dim: The channels' dimension.
        on_small_batch: What to do in training with one value per channel, whose variance is
            unknown: `"error"`; normalize by the `"running"` statistics; or `"skip"` the batch: xhat
            is 0, so y = activation(bias + residual). The last two update nothing.
        inplace: Whether y is written over `input`, which is returned. Only where no gradient is
            recorded through the call, since the backward pass reads `input`.
        num_batches_tracked: Counted up, in place, by every batch that updated the statistics.

    Returns:
        y, in the shape, the type and the memory format of `input`.

    Raises:
        ValueError: An argument has a value or a shape that cannot be, or the batch has one value
            per channel in training.
        RuntimeError: A per-channel tensor has the wrong size, or a tensor is on another device;
            running statistics are missing in inference; a backend was forced that cannot serve the
            call; or `inplace` cannot be.
        TypeError: `input` is complex or of an integer type.

    Example:
        >>> import batchnorm as bn, torch
        >>> x = torch.tensor([[3.0], [5], [8], [9], [11], [24]])
        >>> bn.batch_norm(x, training=True).ravel()
        tensor([-1.0321, -0.7372, -0.2949, -0.1474,  0.1474,  2.0642])

    Source:
        Ioffe & Szegedy, Batch Normalization, 2015, algorithms 1 and 2 (arXiv:1502.03167).
    """
    if on_small_batch != "error":
        check_on_small_batch(on_small_batch)
    if mask is None and not inplace and not is_traced_or_transformed():
        found = plain.forward(
            input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
            training, channel_dim, eps, correction, activation,
        )  # fmt: skip
        if found is not None:
            y, call = found
            if is_recorded(input, weight, bias, residual):
                call.y = y
                y = apply_plainly(input, weight, bias, residual, call)
            if training and running_mean is not None and running_var is not None:
                check_momentum(momentum, num_batches_tracked)
                if not in_backward():  # a checkpoint's
                    call.lead(running_mean, running_var, momentum, num_batches_tracked)
            return y
    form = Form(channel_dim, eps, correction, Activation.parse(activation))
    values, mask = check_batch(
        input, running_mean, running_var, weight, bias, residual, mask, training, form
    )
    if inplace:
        check_inplace(input, weight, bias, residual)
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            "running_mean and running_var must either both be None or neither be None, but "
            f"{'running_mean' if running_mean is None else 'running_var'} alone is None"
        )
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    track = training and running is not None
    if training and values == 1:
        if on_small_batch == "error":
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{input.shape}: the variance of one value is unknown. Leave out the last, smaller "
                'batch (drop_last=True), or choose on_small_batch="running" or "skip"'
            )
        track = False
        training = on_small_batch == "skip"
        mask = input.new_zeros([1] * input.ndim) if training else mask
    if not training and running is None:
        raise RuntimeError(
            "running_mean must be defined in evaluation mode, and running_var too: pass them, or "
            "training=True to normalize by the batch's own moments"
        )
    weight, bias = _flat(weight), _flat(bias)
    running = None if running is None else (_flat(running[0]), _flat(running[1]))
    y, moments = normalize(
        input,
        weight,
        bias,
        running=None if training else running,
        residual=residual,
        mask=mask,
        form=form,
        track=track,
        out=input if inplace else None,
    )
    again = not torch.compiler.is_compiling() and in_backward()  # a checkpoint's
    if track and running is not None and moments is not None and not again:
        update_running(*running, moments, momentum, num_batches_tracked)
    return y


def _flat(values: T) -> T:
    """Return one number a channel as (C,), whatever shape it had."""
    return values if values is None or values.ndim == 1 else values.view(-1)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    running: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    track: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """Return y, and the batch's moments where those normalized it.

    Args:
        x: The batch, checked.
        weight: gamma, (C,), or None.
        bias: beta, (C,), or None.
        running: (mean, var) to normalize by, or None for the batch's own.
        residual: Added before the activation, or None.
        mask: The weights of the positions, of the rank of `x`, or None.
        form: What does not change from call to call.
        track: Whether running statistics will follow the moments.
        out: Where y goes, maybe over `x`, or None for new memory; no gradient is recorded then.
    """
    recorded = is_recorded(x, weight, bias, residual)
    if is_traced_or_transformed():
        forward = DIFFERENTIABLE.forward
        if operators.serve(x, running is None or recorded, track):
            forward = operators.forward
        elif running is not None and recorded and is_compiling():
            running = operators.snapshot(running[0]), operators.snapshot(running[1])
        found = forward(x, weight, bias, residual, mask, form, running, out)
        return found.y, found.moments
    backend = kernels.choose(x, form, residual)
    if recorded:
        # which `apply` would do: what is left of the tensors of transforms that ended
        x, weight, bias, residual = unwrap_dead_wrappers((x, weight, bias, residual))
        with torch.no_grad():
            found = backend.forward(x, weight, bias, residual, mask, form, running)
        call = Call(found, backend, form, mask)
        y = BatchNormNode.apply(x, weight, bias, residual, call)  # type: ignore[no-untyped-call]
        return y, found.moments
    found = backend.forward(x, weight, bias, residual, mask, form, running, out)
    return found.y, found.moments


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | None,
    num_batches_tracked: Tensor | None = None,
) -> None:
    """Move the running statistics towards a batch's moments, in place.

        running = (1 - momentum) * running + momentum * batch,     var by m / (m - 1)

    Moments of fewer than two values, or that are not finite, change nothing. No value is read back
    from the device.

    Args:
        running_mean: (C,), updated.
        running_var: (C,), updated; takes the unbiased variance.
        moments: Of the batch.
        momentum: How much the batch counts; None for the plain average over all batches.
        num_batches_tracked: The number of updates, a scalar, updated.

    Raises:
        ValueError: `momentum` is None and there is no `num_batches_tracked`.
    """
    if not isinstance(moments.count, Tensor) and moments.count <= 1:
        return
    check_momentum(momentum, num_batches_tracked)
    if not is_traced_or_transformed() and native.follow(
        (running_mean, running_var), moments, momentum, num_batches_tracked
    ):
        return
    moments = moments.detach()
    mean, var = moments.mean, moments.var(correction=1)
    rate: Tensor | float
    if momentum is not None:
        rate = momentum
    elif num_batches_tracked is not None:
        rate = 1 / (num_batches_tracked + 1).to(mean.dtype)
    steps = [
        ((batch - running) * rate).to(running.dtype)
        for running, batch in ((running_mean, mean), (running_var, var))
    ]
    good = steps[0].isfinite().all() & steps[1].isfinite().all() & (moments.count > 1)
    if is_compiling():
        good = good & ~operators.is_recomputation(running_mean)
    for running, step in zip((running_mean, running_var), steps, strict=True):
        running.add_(torch.where(good, step, 0))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(good)
