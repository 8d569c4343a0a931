"""The checks of a call's arguments, with the messages of `torch.nn` where it has one."""

from __future__ import annotations

import math
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor

from batchnorm.functional.autograd import is_recorded
from batchnorm.kernels import Form
from batchnorm.kernels.layouts import is_apart

OnSmallBatch = Literal["error", "running", "skip"]
_CHOICES = get_args(OnSmallBatch)


def check_on_small_batch(choice: OnSmallBatch) -> None:
    """Raise ValueError unless it is one of the three."""
    if choice not in _CHOICES:
        raise ValueError(f"on_small_batch is {choice!r}: expected 'error', 'running' or 'skip'")


def check_ghost_size(size: int) -> None:
    """Raise ValueError unless groups can have so many examples."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"ghost_size is {size!r}: expected a number of examples, 1 or more")


def check_batch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    form: Form,
) -> tuple[int, Tensor | None]:
    """Return the number of values per channel, and the mask as weights in the rank of `x`.

    Of groups it is that of the smallest.

    Raises:
        TypeError: `x` is not of a real floating-point type.
        ValueError: A shape or a setting cannot be.
        RuntimeError: A per-channel tensor has the wrong size, or one is on another device.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"batch_norm takes a real floating-point input, but got {x.dtype}: "
            + ("normalize x.real and x.imag apart" if x.is_complex() else "convert it, x.float()")
        )
    given = (("weight", weight), ("bias", bias), ("residual", residual), ("mask", mask))
    for name, tensor in given:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: expected a tensor or None")
        if tensor.is_complex():
            raise TypeError(f"{name} is complex, of type {tensor.dtype}: expected real numbers")
    if not -x.ndim <= form.channel_dim < x.ndim:
        raise ValueError(
            f"channel_dim is {form.channel_dim}, but the input has {x.ndim} dimensions, of size "
            f"{tuple(x.shape)}"
        )
    if training and form.eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {form.eps}")
    if form.eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {form.eps}")
    channels = x.shape[form.channel_dim]
    per_channel = (("running_mean", running_mean), ("running_var", running_var), *given[:2])
    device = x.device
    for name, values in per_channel:
        if values is None:
            continue
        if values.device != device:
            _refuse_elsewhere(name, values, x)
        if values.numel() != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements not {values.numel()}: the input, of "
                f"size {tuple(x.shape)}, has {channels} channels in dimension {form.channel_dim}"
            )
    if residual is not None and residual.device != device:
        _refuse_elsewhere("residual", residual, x)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual is of size {tuple(residual.shape)}: expected that of the input, "
            f"{tuple(x.shape)}"
        )
    positions = list(x.shape)
    del positions[form.channel_dim]
    groups = form.groups(x.shape)
    count = math.prod(positions) if groups is None else groups.shortest * groups.places
    return count, None if mask is None else _weights(mask, x, positions, form)


def check_inplace(x: Tensor, *others: Tensor | None) -> None:
    """Raise RuntimeError unless y, which depends on `x` and `others`, may be written over `x`."""
    if is_recorded(x, *others):
        raise RuntimeError(
            "inplace=True overwrites the input, but the backward pass reads it, and a gradient is "
            "recorded through this call: call it under torch.no_grad(), or leave inplace away"
        )
    made_apart = not torch.compiler.is_compiling() and x.is_inference()  # not to be traced
    if made_apart and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inplace=True overwrites the input, but that was made under torch.inference_mode() and "
            "cannot be changed outside of it: clone it first, or leave inplace away"
        )
    if 0 not in x.shape and not is_apart(x.shape, x.stride()):
        raise RuntimeError(
            "inplace=True overwrites the input, but several of its values share one place in "
            f"memory: it is of size {tuple(x.shape)} with strides {x.stride()}, as expand and "
            "unfold make them. Clone it first, or leave inplace away"
        )


def check_momentum(momentum: float | None, num_batches_tracked: Tensor | None) -> None:
    """Raise ValueError if an average over all batches is wanted, and nobody counts them."""
    if momentum is None and num_batches_tracked is None:
        raise ValueError("momentum=None averages over all batches: pass num_batches_tracked")


def _refuse_elsewhere(name: str, tensor: Tensor, x: Tensor) -> NoReturn:
    raise RuntimeError(
        f"{name} is on {tensor.device}, but the input is on {x.device}: move one to the other, "
        f'as by layer.to("{x.device}")'
    )


def _weights(mask: Tensor, x: Tensor, positions: list[int], form: Form) -> Tensor:
    """Return a mask over the positions as weights of the rank of `x`, of size 1 along channels."""
    dim = form.channel_dim % x.ndim
    # not by torch.promote_types, which would be a node of an exported graph
    dtype = max(torch.float32, x.dtype, key=lambda dtype: dtype.itemsize)
    fits = mask.ndim < x.ndim and all(
        size in (1, expected)
        for size, expected in zip(reversed(mask.shape), reversed(positions), strict=False)
    )
    if fits:
        missing = [1] * (len(positions) - mask.ndim)
        mask = mask.reshape(missing + list(mask.shape)).unsqueeze(dim)
    elif mask.ndim != x.ndim or any(
        size not in ((1,) if at == dim else (1, x.shape[at])) for at, size in enumerate(mask.shape)
    ):
        raise ValueError(
            f"mask is of size {tuple(mask.shape)}: expected one that broadcasts over the "
            f"positions, {tuple(positions)}, which are the input's size {tuple(x.shape)} without "
            f"its channels"
        )
    return mask.detach().to(device=x.device, dtype=dtype)
