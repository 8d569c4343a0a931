"""JAX, compiled by XLA: batch normalization as `flax.linen.BatchNorm` computes it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.bench.cases import BOTH, INFERENCE, PLAIN, Case
from batchnorm.bench.contenders.contender import Step
from batchnorm.bench.problem import Posed

#: How large XLA makes its pool of threads, read when it is first used.
_POOL = "NPROC"


class Jitted:
    """One function under `jax.jit`: y, the running statistics that follow, and `jax.vjp`.

    A batch with the channels last is an array with the channels as its last dimension.
    """

    name, ours = "jax", False

    def missing(self) -> str | None:
        """Return whether JAX is not installed."""
        if importlib.util.find_spec("jax") is None:
            return 'jax is not installed: pip install "batchnorm[bench]"'
        return None

    def step(self, case: Case, posed: Posed) -> Step:
        """Return what is timed; the first call compiles."""
        jax = _jax(case.threads)
        last = posed.problem.channels_last
        compute = jax.jit(_function(case, posed.x.ndim - 1 if last else 1))
        batches = [posed.x, posed.dy, posed.residual]
        channels = [posed.weight, posed.bias, posed.running_mean, posed.running_var]
        device = jax.devices("cpu")[0]
        arguments = [
            None if tensor is None else jax.device_put(_to_numpy(tensor), device)
            for tensor in [*(_ordered(t, last) for t in batches), *channels]
        ]

        def read(result: Any) -> tuple[Tensor, ...]:
            tensors = [_to_torch(array) for array in result[0] if array is not None]
            return tuple(t.movedim(-1, 1) if last and t.ndim > 1 else t for t in tensors)

        return Step(lambda: jax.block_until_ready(compute(*arguments)), read)


def _jax(threads: int) -> Any:
    """Import JAX, whose pool is as large as it is when this is first called."""
    before = os.environ.get(_POOL)
    os.environ[_POOL] = str(threads)
    try:
        import jax

        jax.devices("cpu")
    finally:
        if before is None:
            del os.environ[_POOL]
        else:
            os.environ[_POOL] = before
    return jax


def _function(case: Case, channel_dim: int) -> Any:
    """Return the function to compile: the results, and the running statistics that follow."""
    import jax
    from jax import numpy as jnp

    relu, training = case.problem.fusion != PLAIN, case.mode != INFERENCE

    def layer(x: Any, weight: Any, bias: Any, residual: Any, mean: Any, var: Any) -> Any:
        axes = tuple(d for d in range(x.ndim) if d != channel_dim)
        values = x.astype(jnp.float32)
        running = mean, var
        if training:
            mean = values.mean(axes)
            var = jnp.maximum(0, jnp.square(values).mean(axes) - jnp.square(mean))
            unbiased = var * (x.size / (x.size - mean.size))
            pairs = zip(running, (mean, unbiased), strict=True)
            running = tuple(0.9 * old + 0.1 * new for old, new in pairs)
        mean, scale, bias = (
            jnp.expand_dims(v, axes) for v in (mean, jax.lax.rsqrt(var + 1e-5) * weight, bias)
        )
        y = ((values - mean) * scale + bias).astype(x.dtype)
        y = y if residual is None else y + residual
        return jax.nn.relu(y) if relu else y, running

    def forward(x: Any, dy: Any, residual: Any, weight: Any, bias: Any, *running: Any) -> Any:
        y, running = layer(x, weight, bias, residual, *running)
        return (y,), running

    def both(x: Any, dy: Any, residual: Any, weight: Any, bias: Any, *running: Any) -> Any:
        y, pull, running = jax.vjp(
            lambda *given: layer(*given, *running), x, weight, bias, residual, has_aux=True
        )
        return (y, *pull(dy)), running

    return both if case.mode == BOTH else forward


def _ordered(batch: Tensor | None, last: bool) -> Tensor | None:
    return batch.movedim(1, -1) if batch is not None and last else batch


def _to_numpy(tensor: Tensor) -> Any:
    """Return a tensor as NumPy has it; bfloat16 is there only with the package of JAX."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _to_torch(array: Any) -> Tensor:
    found = np.asarray(array)
    if found.dtype.kind != "f":  # bfloat16, which NumPy itself does not know
        return torch.from_numpy(found.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(found.copy())
