"""The layer as operators of torch: what a compiler calls, and does not look into.

`batchnorm::forward` and `batchnorm::backward` are the two fused calls of a backend, which is chosen
when they run. The other two ask what compiled code must ask when it runs, and not when it is
traced: a compiler sees the layer once, cannot know then whether a call will be the recomputation of
a checkpoint, and may keep a buffer for the backward pass where a copy was asked for.

They are registered by the lower of torch's two interfaces, which costs a call less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.functional.autograd import gradients
from batchnorm.functional.surroundings import in_backward, is_compiling, is_transformed
from batchnorm.kernels import Activation, Form, Found, Given, Gradients, Needs, native, triton
from batchnorm.moments import Moments, statistics_dtype

_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")  # type: ignore[no-untyped-call]

#: A `Form` in a schema, as `_numbers` gives it and `form_of` takes it.
_FORM = (
    "int channel_dim, float eps, float correction, str? activation, float? parameter,"
    " int? ghost_size"
)
_FORWARD = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,"
    f" Tensor? running_mean, Tensor? running_var, {_FORM})"
    " -> (Tensor y, Tensor mean, Tensor inverse_std, Tensor m2, Tensor count)"
)
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor mean, Tensor inverse_std, Tensor? weight, Tensor? bias,"
    f" Tensor? residual, Tensor? mask, {_FORM}, Tensor? count, bool[4] needs) -> Tensor[]"
)


def serve(x: Tensor, form: Form, training: bool, track: bool) -> bool:
    """Return whether the operators serve a batch that is traced, and not plain operations.

    They do where `torch.compile` traces a training step and there are kernels: on a CPU these are
    faster than what it makes of plain operations. For a GPU it fuses well, so that there they serve
    calls that end in an activation, after which little is left to fuse. Inference by running
    statistics is one pass either way, which it fuses with what stands around it. An exported graph
    that predicts must run without this package, so there they serve only what tracks statistics.
    What is transformed has to be plain, and so have batches of subclasses that take operations
    apart themselves.

    Args:
        x: The batch.
        form: Of the call.
        training: Whether a gradient is recorded, or the batch's own moments normalize it.
        track: Whether running statistics will follow the moments.
    """
    return (
        (track if torch.compiler.is_exporting() else training and is_compiling())
        and (native.takes(x) or (form.activation is not None and triton.takes(x)))
        and not is_transformed()
        and not hasattr(type(x), "__tensor_flatten__")
    )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    running: tuple[Tensor, Tensor] | None,
    out: Tensor | None = None,
) -> Found:
    """Return what `Backend.forward` does, by the operator."""
    y, mean, inverse_std, m2, count = torch.ops.batchnorm.forward.default(
        x, weight, bias, residual, mask, *(running or (None, None)), *_numbers(form)
    )
    moments = None if running is not None else Moments(count, mean, m2)
    return Found(y if out is None else out.copy_(y), moments, mean, inverse_std)


def backward(dy: Tensor, given: Given, count: Tensor | float | None, needs: Needs) -> Gradients:
    """Return what `Backend.backward` does, by the operator."""
    *tensors, form = given
    through_z = form.activation is not None  # or else the residual's gradient is dy
    asked = needs._replace(residual=needs.residual and through_z)
    wanted = iter(())
    if any(asked):
        wanted = iter(
            torch.ops.batchnorm.backward.default(dy, *tensors, *_numbers(form), count, [*asked])
        )
    found = Gradients._make(next(wanted) if need else None for need in asked)
    return found if through_z else found._replace(residual=dy)


def is_recomputation(like: Tensor) -> Tensor:
    """Return `in_backward()` at the time of the call, as a scalar on the device of `like`."""
    answer: Tensor = torch.ops.batchnorm.is_recomputation.default(like)
    return answer


def snapshot(buffer: Tensor) -> Tensor:
    """Return a copy of a buffer that autograd may keep while the buffer itself changes."""
    copy: Tensor = torch.ops.batchnorm.snapshot.default(buffer)
    return copy


def _numbers(form: Form) -> tuple[int, float, float, str | None, float | None, int | None]:
    pair = (None, None) if form.activation is None else form.activation.pair
    return form.channel_dim, form.eps, form.correction, *pair, form.ghost_size


@lru_cache(maxsize=256)
def form_of(
    channel_dim: int,
    eps: float,
    correction: float,
    name: str | None,
    parameter: float | None,
    ghost_size: int | None,
) -> Form:
    """Return the form that these numbers of an operator are."""
    activation = None if name is None else Activation(name, parameter)
    return Form(channel_dim, eps, correction, activation, ghost_size)


def _run_forward(*arguments: Any) -> tuple[Tensor, ...]:
    x, weight, bias, residual, mask, mean, var, *numbers = arguments
    form, running = form_of(*numbers), None if mean is None else (mean, var)
    y, moments, mean, inverse_std = kernels.choose(x, form, residual).forward(
        x, weight, bias, residual, mask, form, running
    )
    y = _fitted(y, x, x.dtype)
    if moments is None:
        return y, mean, inverse_std, mean.new_empty(0), mean.new_empty(0)
    count = moments.count
    if not isinstance(count, Tensor):
        count = torch.full((), count, dtype=mean.dtype, device=mean.device)
    return y, mean, inverse_std, moments.m2, count


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    x, by_batch, form = arguments[0], arguments[5] is None, form_of(*arguments[7:])
    mean = x.new_empty(x.shape[form.channel_dim], dtype=statistics_dtype(x.device))
    if by_batch and (groups := form.groups(x.shape)) is not None:
        mean = mean.new_empty(groups.number, *mean.shape)
    m2, count = mean.new_empty(0), mean.new_empty(0)
    if by_batch:
        m2, count = mean, mean.new_empty(() if mean.ndim == 1 else (mean.shape[0], 1))
    return torch.empty_like(x), mean, *map(torch.empty_like, (mean, m2)), count


def _run_backward(dy: Tensor, *arguments: Any) -> list[Tensor]:
    given, count, needs = _given(arguments)
    found = kernels.choose(given.x, given.form, given.residual).backward(dy, given, count, needs)
    wanted = (g for g, need in zip(found, needs, strict=True) if need and g is not None)
    likenesses = _likenesses(given, needs)
    return [_fitted(g, *likeness) for g, likeness in zip(wanted, likenesses, strict=True)]


def _fake_backward(dy: Tensor, *arguments: Any) -> list[Tensor]:
    given, _, needs = _given(arguments)
    return [torch.empty_like(like, dtype=dtype) for like, dtype in _likenesses(given, needs)]


def _given(arguments: tuple[Any, ...]) -> tuple[Given, Tensor | None, Needs]:
    """Return what the backward operator takes after dy."""
    *others, count, needs = arguments
    return Given._make([*others[:7], form_of(*others[7:])]), count, Needs._make(needs)


def _likenesses(given: Given, needs: Needs) -> list[tuple[Tensor, torch.dtype]]:
    """Return for each gradient that is wanted a tensor of its shape and layout, and its type."""
    x, mean, _, weight, bias, residual, *_ = given
    mean = mean if mean.ndim == 1 else mean[0]
    pairs = (x, x), (mean, weight), (mean, bias), (x, residual)
    return [
        (like, v.dtype)
        for (like, v), need in zip(pairs, needs, strict=True)
        if need and v is not None
    ]


def _fitted(found: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a result in its type, with the strides that were promised: those of `empty_like`."""
    found = found.to(dtype)
    if found.stride() == like.stride():
        return found
    promised = torch.empty_like(like, device="meta").stride()
    steps = zip(found.shape, found.stride(), promised, strict=True)
    if all(size <= 1 or step == other for size, step, other in steps):
        return found
    return torch.empty_like(like, dtype=dtype).copy_(found)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep x and two numbers a channel, as the node of eager code does."""
    x, weight, bias, residual, mask, running_mean, _, *numbers = inputs
    _, mean, inverse_std, _, count = output
    ctx.form = form = form_of(*numbers)
    ctx.save_for_backward(
        count if running_mean is None else None,
        x,
        mean,
        inverse_std,
        weight,
        bias,
        residual if form.activation else None,  # z's alone
        mask,
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.needs_input_grad[4:])
    if dy is None:
        return None, None, None, None, *nothing
    count, *tensors = ctx.saved_tensors
    needs = Needs._make(ctx.needs_input_grad[:4])
    return *gradients(backward, dy, Given._make([*tensors, ctx.form]), count, needs), *nothing


def _run_is_recomputation(like: Tensor) -> Tensor:
    return torch.full((), in_backward(), device=like.device)


def _fake_is_recomputation(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


def _run_snapshot(buffer: Tensor) -> Tensor:
    return buffer.detach().clone()


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None,
) -> None:
    """Register an operator for all devices.

    Args:
        name: Of the operator.
        schema: What it takes and returns.
        run: The operator.
        fake: Returns what `run` does, but for the values.
        differentiate: Its backward pass, or None if it has none.
        keep: Keeps what that needs.
    """
    library: Any = _LIBRARY  # which has no types
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchnorm::{name}", fake, lib=_LIBRARY)
    if differentiate is not None:
        torch.library.register_autograd(
            f"batchnorm::{name}", differentiate, setup_context=keep, lib=_LIBRARY
        )


define("forward", _FORWARD, _run_forward, _fake_forward, _differentiate, _keep)
define("backward", _BACKWARD, _run_backward, _fake_backward)
define("is_recomputation", "(Tensor like) -> Tensor", _run_is_recomputation, _fake_is_recomputation)
define("snapshot", "(Tensor buffer) -> Tensor", _run_snapshot, torch.empty_like)
