"""The running statistics: how they follow the moments of batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.functional import operators
from batchnorm.functional.checks import check_momentum
from batchnorm.functional.surroundings import in_backward, is_compiling, is_traced_or_transformed
from batchnorm.kernels import native, triton
from batchnorm.kernels.plain import Plain
from batchnorm.moments import Moments


class State(NamedTuple):
    """Running statistics as a value: what the pure `batch_norm` takes and returns.

    Attributes:
        running_mean: (C,).
        running_var: (C,).
        num_batches_tracked: The number of updates, a scalar, or None if nobody counts them; `vmap`
            takes and returns tensors only.

    Example:
        >>> import batchnorm as bn, torch
        >>> bn.State(torch.zeros(3), torch.ones(3)).num_batches_tracked is None
        True
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None = None

    @classmethod
    def new(
        cls,
        num_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Return the running statistics of a new layer: a mean of 0, a variance of 1, no update.

        Args:
            num_features: Number of channels, C.
            device: Where; torch's default device if left out.
            dtype: The type of mean and variance; torch's default if left out.

        Example:
            >>> import batchnorm as bn
            >>> bn.State.new(2)
            State(running_mean=tensor([0., 0.]), running_var=tensor([1., 1.]),
                  num_batches_tracked=tensor(0))
        """
        mean = torch.zeros(num_features, dtype=dtype, device=device)
        tracked = torch.zeros((), dtype=torch.int64, device=device)
        return cls(mean, torch.ones_like(mean), tracked)


class Tracked:
    """The moments that running statistics are to follow, of a call that was not plain."""

    __slots__ = ("_moments",)

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def moments(self) -> Moments:
        """Return the moments of the batch."""
        return self._moments


def is_recomputed(found: Plain | Tracked) -> bool | Tensor:
    """Return whether a call recomputes a checkpoint: in compiled code, as a tensor of its own time.

    Args:
        found: What the call found.
    """
    if is_compiling():
        return operators.is_recomputation(found.moments().mean)
    return not torch.compiler.is_compiling() and in_backward()


def refuse_recomputation(what: str) -> None:
    """Raise RuntimeError in a recomputation, of what needs running statistics that have moved.

    Args:
        what: What it is, to begin the message with.
    """
    if not torch.compiler.is_compiling() and in_backward():
        raise RuntimeError(
            f"{what}, and a checkpoint recomputes it: but the running statistics have moved since, "
            "and the gradient would be wrong. Leave it out of the checkpoint"
        )


def follow(found: Plain | Tracked, state: State, momentum: float | None) -> None:
    """Move running statistics, in place, towards what a call found; see `update_running`.

    A recomputation of a checkpoint moves nothing.

    Args:
        found: What the call found.
        state: The running statistics, updated.
        momentum: How much the batch counts; None for the plain average over all batches.

    Raises:
        ValueError: `momentum` is None and nobody counts the batches.
    """
    check_momentum(momentum, state.num_batches_tracked)
    if not torch.compiler.is_compiling() and in_backward():
        return
    mean, var, tracked = state
    if not isinstance(found, Plain) or not found.lead(mean, var, momentum, tracked):
        update_running(mean, var, found.moments(), momentum, tracked)


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
    if not is_traced_or_transformed():
        given = running_mean, running_var, moments, momentum, num_batches_tracked
        if native.follow(*given) or triton.follow(*given):
            return
    state = State(running_mean, running_var, num_batches_tracked)
    steps, good = _steps(state, moments, momentum)
    if is_compiling():
        good = good & ~operators.is_recomputation(running_mean)
    for running, step in zip((running_mean, running_var), steps, strict=True):
        running.add_(torch.where(good, step, 0))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(good)


def moved(state: State, moments: Moments, momentum: float | None) -> State:
    """Return the running statistics after `update_running`, as new tensors.

    Args:
        state: The running statistics, left alone.
        moments: Of the batch.
        momentum: How much the batch counts; None for the plain average over all batches.

    Raises:
        ValueError: `momentum` is None and nobody counts the batches.
    """
    check_momentum(momentum, state.num_batches_tracked)
    steps, good = _steps(state, moments, momentum)
    mean, var = (
        running + torch.where(good, step, 0)
        for running, step in zip((state.running_mean, state.running_var), steps, strict=True)
    )
    tracked = state.num_batches_tracked
    return State(mean, var, None if tracked is None else tracked + good)


def _steps(
    state: State, moments: Moments, momentum: float | None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return by how much both statistics move, and whether they may."""
    moments = moments.detach()
    mean, var = moments.mean, moments.var(correction=1)
    rate: Tensor | float
    if momentum is not None:
        rate = momentum
    elif state.num_batches_tracked is not None:
        rate = 1 / (state.num_batches_tracked + 1).to(mean.dtype)
    to_mean, to_var = (
        ((batch - running) * rate).to(running.dtype)
        for running, batch in ((state.running_mean, mean), (state.running_var, var))
    )
    good = to_mean.isfinite().all() & to_var.isfinite().all() & (moments.count > 1)
    return (to_mean, to_var), good
