"""Batch normalization as a function: the checks, the autograd seam, the running update."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from batchnorm import kernels
from batchnorm.functional import operators, standard
from batchnorm.functional.autograd import BatchNormNode, Call, apply_plainly, is_recorded
from batchnorm.functional.checks import (
    OnSmallBatch,
    check_batch,
    check_ghost_size,
    check_inplace,
    check_on_small_batch,
)
from batchnorm.functional.renorm import Renorm
from batchnorm.functional.running import State, Tracked, follow, moved, refuse_recomputation
from batchnorm.functional.surroundings import is_compiling, is_traced_or_transformed
from batchnorm.functional.synchronized import synchronized
from batchnorm.kernels import DIFFERENTIABLE, Activation, ActivationLike, Form, plain, steps
from batchnorm.kernels.plain import Plain
from batchnorm.kernels.steps import Correction, Corrects, Pool
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T", Tensor, Tensor | None)


@overload
def batch_norm(
    input: Tensor,
    running_mean: State,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: ActivationLike = None,
    correction: float = 0,
    channel_dim: int = 1,
    on_small_batch: OnSmallBatch = "error",
    ghost_size: int | None = None,
    process_group: ProcessGroup | Literal["world"] | None = None,
    renorm: tuple[float, float] | None = None,
) -> tuple[Tensor, State]: ...


@overload
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
    ghost_size: int | None = None,
    process_group: ProcessGroup | Literal["world"] | None = None,
    renorm: tuple[float, float] | None = None,
) -> Tensor: ...


def batch_norm(
    input: Tensor,
    running_mean: Tensor | State | None = None,
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
    ghost_size: int | None = None,
    process_group: ProcessGroup | Literal["world"] | None = None,
    renorm: tuple[float, float] | None = None,
) -> Tensor | tuple[Tensor, State]:
    """Normalize every channel of a batch: `torch.nn.functional.batch_norm`, and more.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var are the batch's own and the running ones follow them; otherwise the
    running ones normalize. A batch that is empty or not finite, and a recomputation under
    `torch.utils.checkpoint`, leave the running statistics as they are.

    With a `State` in place of `running_mean` the function is pure, fit for `vmap` and `torch.func`:
    it changes nothing, and returns y and the next state.

    Args:
        input: The batch x, real floating point, of any rank, with C channels along `channel_dim`.
        running_mean: The running mean, (C,), updated in place in training; or None; or a `State`,
            which has the running variance and the number of batches, too.
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
        activation: `"relu"`, `"leaky_relu"`, `"elu"`, `"silu"`, `"gelu"`, `"sigmoid"`, `"tanh"`,
            `"relu6"`, `"hardswish"`, or a pair with the slope or alpha, as `("leaky_relu", 0.2)`.
        correction: The variance that normalizes is divided by m - correction.
        channel_dim: The channels' dimension.
        on_small_batch: What to do in training with one value per channel, whose variance is
            unknown: `"error"`; normalize by the `"running"` statistics; or `"skip"` the batch: xhat
            is 0, so y = activation(bias + residual). The last two update nothing.
        inplace: Whether y is written over `input`, which is returned. Only where no gradient is
            recorded through the call, since the backward pass reads `input`.
        num_batches_tracked: Counted up, in place, by every batch that updated the statistics.
        ghost_size: In training, so many consecutive examples are normalized on their own; see
            `GhostBatchNorm`.
        process_group: In training, the moments are those over all processes of this group, or of
            the default one, `"world"`; see `SyncBatchNorm`. Ghost batches stay local, and only
            their running update is that over all processes.
        renorm: In training, (r_max, d_max): how far xhat is corrected towards the running
            statistics; see `BatchRenorm`.

    Returns:
        y, in the shape, the type and the memory format of `input`; with a `State`, (y, state).

    Raises:
        ValueError: An argument has a value or a shape that cannot be, or the batch has one value
            per channel in training.
        RuntimeError: A per-channel tensor has the wrong size, or a tensor is on another device;
            running statistics are missing in inference; a backend was forced that cannot serve the
            call; `inplace` cannot be; another process failed; or a checkpoint recomputes a call
            with `renorm` and running statistics that it has moved.
        TypeError: `input` is complex or of an integer type, or `process_group` is no such thing.

    Example:
        >>> import batchnorm as bn, torch
        >>> x = torch.tensor([[3.0], [5], [8], [9], [11], [24]])
        >>> bn.batch_norm(x, training=True).ravel()
        tensor([-1.0321, -0.7372, -0.2949, -0.1474,  0.1474,  2.0642])
        >>> state = bn.State(torch.zeros(1), torch.ones(1))
        >>> y, after = bn.batch_norm(x, state, training=True)
        >>> state.running_mean, after.running_mean
        (tensor([0.]), tensor([1.]))

    Source:
        Ioffe & Szegedy, Batch Normalization, 2015, algorithms 1 and 2 (arXiv:1502.03167).
    """
    training = bool(training)
    state: State | None
    if isinstance(running_mean, State):
        if running_var is not None or num_batches_tracked is not None or inplace:
            raise ValueError(
                "with a State the function is pure: running_var and num_batches_tracked are in "
                "the State, weight and bias go by keyword, and inplace cannot be"
            )
        state, pure = running_mean, True
    else:
        if (running_mean is None) != (running_var is None):
            raise ValueError(
                "running_mean and running_var must either both be None or neither be None, but "
                f"{'running_mean' if running_mean is None else 'running_var'} alone is None"
            )
        pure = False
        state = (
            None
            if running_mean is None or running_var is None
            else State(_flat(running_mean), _flat(running_var), num_batches_tracked)
        )
    corrects = None
    if renorm is not None and training:
        if state is None:
            raise ValueError("renorm corrects towards running statistics, but there are none")
        if not pure:
            refuse_recomputation("batch_norm corrects towards running statistics (renorm)")
        corrects = Renorm(state.running_mean, state.running_var, *renorm, eps)
    y, found = run(
        input, state, weight, bias, residual, mask, training, training and state is not None,
        channel_dim, eps, correction, activation, ghost_size, on_small_batch, inplace,
        None if process_group is None else synchronized(process_group), corrects,
    )  # fmt: skip
    if not pure:
        if found is not None and state is not None:
            follow(found, state, momentum)
        return y
    assert state is not None
    return y, state if found is None else moved(state, found.moments(), momentum)


def run(
    input: Tensor,
    state: State | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    by_batch: bool,
    track: bool,
    channel_dim: int,
    eps: float,
    correction: float,
    activation: ActivationLike,
    ghost_size: int | None,
    on_small_batch: OnSmallBatch,
    inplace: bool,
    pool: Pool | None,
    corrects: Corrects | None,
) -> tuple[Tensor, Plain | Tracked | None]:
    """Return y, and what running statistics are to follow, where they are: nothing is updated.

    Args:
        input: The batch.
        state: The running statistics, or None.
        weight: gamma, or None.
        bias: beta, or None.
        residual: Added before the activation, or None.
        mask: The positions that are there, or None.
        by_batch: Whether the batch's own moments normalize it, or the running ones.
        track: Whether running statistics will follow the batch's moments.
        channel_dim: The channels' dimension.
        eps: Added to the variance.
        correction: The variance that normalizes is divided by m - correction.
        activation: As a user names it.
        ghost_size: Number of examples in a group, or None.
        on_small_batch: What one value per channel means.
        inplace: Whether y is written over `input`.
        pool: What else the moments are those of, or None.
        corrects: What corrects them, or None.
    """
    if on_small_batch != "error":
        check_on_small_batch(on_small_batch)
    if not by_batch:
        corrects = None
    elif ghost_size is not None:
        check_ghost_size(ghost_size)
    groups_of = ghost_size if by_batch else None
    if (
        mask is None
        and pool is None
        and corrects is None
        and not inplace
        and (by_batch or not track)
        and not is_traced_or_transformed()
    ):
        mean, var, _ = (None, None, None) if state is None else state
        done = plain.forward(
            input, residual, weight, bias, mean, var, by_batch, track, channel_dim, eps,
            correction, activation, groups_of,
        )  # fmt: skip
        if done is not None:
            y, call = done
            if is_recorded(input, weight, bias, residual):
                call.y = y
                y = apply_plainly(input, weight, bias, residual, call)
            return y, call if track else None
    form = Form(channel_dim, eps, correction, Activation.parse(activation), groups_of)
    values, mask = check_batch(
        input, state and state.running_mean, state and state.running_var, weight, bias, residual,
        mask, by_batch, form,
    )  # fmt: skip
    if inplace:
        check_inplace(input, weight, bias, residual)
    if by_batch and values == 1 and (pool is None or ghost_size is not None):
        if on_small_batch == "error":
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{input.shape}{'' if ghost_size is None else f' in groups of {ghost_size}'}: the "
                "variance of one value is unknown. Leave out the last, smaller batch "
                '(drop_last=True), or choose on_small_batch="running" or "skip"'
            )
        by_batch = on_small_batch == "skip"
        if track and not by_batch:
            refuse_recomputation('one value per channel is normalized by the "running" statistics')
        # its one value may be one of many; and other processes wait for what it gives
        track = track and (not by_batch or pool is not None)
        mask = input.new_zeros([1] * input.ndim) if by_batch else mask
        form = form._replace(ghost_size=None)
        corrects = None
    if not by_batch and state is None:
        raise RuntimeError(
            "running_mean must be defined in evaluation mode, and running_var too: pass them, or "
            "training=True to normalize by the batch's own moments"
        )
    weight, bias = _flat(weight), _flat(bias)
    own: Moments | None = None
    if track and not by_batch:  # the running statistics normalize, and follow all the same
        backend = DIFFERENTIABLE if is_traced_or_transformed() else kernels.choose(input, form)
        with torch.no_grad():
            own = backend.collect(input.detach(), mask, form)  # before y is written over it
    y, moments = normalize(
        input,
        weight,
        bias,
        running=None if by_batch or state is None else state[:2],
        residual=residual,
        mask=mask,
        form=form,
        track=track,
        out=input if inplace else None,
        pool=pool if by_batch and groups_of is None else None,
        corrects=corrects,
    )
    if not track:
        return y, None
    if own is None:
        assert moments is not None  # those that normalized
        if groups_of is None:
            return y, Tracked(moments)
        own = moments
    own = own.detach().merged()
    return y, Tracked(own if pool is None else pool.moments(own))


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
    pool: Pool | None = None,
    corrects: Corrects | None = None,
) -> tuple[Tensor, Moments | None]:
    """Return y, and the moments that normalized it, where those were not the running ones.

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
        pool: What else the moments are those of, or None.
        corrects: What corrects them, or None.
    """
    recorded = is_recorded(x, weight, bias, residual)
    between = pool is not None or corrects is not None
    if is_traced_or_transformed():
        if between:
            found, _ = steps.forward(
                DIFFERENTIABLE, x, weight, bias, residual, mask, form, out, pool, corrects
            )
            return found.y, found.moments
        forward = DIFFERENTIABLE.forward
        if operators.serve(x, form, running is None or recorded, track):
            forward = operators.forward
        elif running is not None:
            if recorded and is_compiling():
                running = operators.snapshot(running[0]), operators.snapshot(running[1])
            if not track and standard.serves(x):  # or else autograd would keep what will move
                return standard.forward(x, weight, bias, residual, mask, form, running, out), None
        found = forward(x, weight, bias, residual, mask, form, running, out)
        return found.y, found.moments
    backend = kernels.choose(x, form, residual)
    if recorded:
        # which `apply` would do: what is left of the tensors of transforms that ended
        x, weight, bias, residual = unwrap_dead_wrappers((x, weight, bias, residual))
    correction: Correction | None = None
    with torch.set_grad_enabled(False) if recorded else nullcontext():
        if between:
            found, correction = steps.forward(
                backend, x, weight, bias, residual, mask, form, out, pool, corrects
            )
        else:
            found = backend.forward(x, weight, bias, residual, mask, form, running, out)
    if not recorded:
        return found.y, found.moments
    call = Call(found, backend, form, mask, pool, correction)
    y = BatchNormNode.apply(x, weight, bias, residual, call)  # type: ignore[no-untyped-call]
    return y, found.moments
