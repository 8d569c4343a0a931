"""Batch normalization for Keras 3 on its torch backend, by the kernels of this package."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.functional import State, batch_norm, in_backward, operators
from batchnorm.functional.surroundings import is_compiling, is_transformed
from batchnorm.kernels import Activation
from batchnorm.layers.recent import Recent

try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError('batchnorm.keras needs Keras: pip install "batchnorm[keras]"') from error
    raise ImportError(
        f"Keras cannot import the backend it was told to use ({error}): set the environment "
        "variable KERAS_BACKEND=torch before Keras is first imported"
    ) from error

if keras.backend.backend() != "torch":
    raise RuntimeError(
        f"batchnorm.keras needs Keras's torch backend, but Keras runs on "
        f"{keras.backend.backend()}: set the environment variable KERAS_BACKEND=torch before "
        "Keras is first imported"
    )


class _Batch(NamedTuple):
    """What a batch says of every channel."""

    mean: Tensor
    var: Tensor  # biased, as Keras takes it
    good: Tensor  # whether the moving statistics follow it


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalization as a Keras layer, in place of `keras.layers.BatchNormalization`.

        y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta)
        moving = momentum * moving + (1 - momentum) * batch

    In training the batch's moments normalize it, otherwise the moving ones. The arguments, weights
    and conventions are Keras's: momentum is the share of what is kept, the moving variance takes
    the biased variance of the batch, and a layer with `trainable=False` runs in inference mode. It
    is a subclass of Keras's layer, so what looks for that finds it; the arithmetic is `batch_norm`.

    A batch whose moving statistics Keras would spoil leaves them as they are: one whose positions
    are all masked, or that has one value a channel, is empty, or is not finite. So does what a
    checkpoint recomputes, as under `keras.RematScope`. They are float32 or wider under every dtype
    policy.

    Args:
        axis: The channels' dimension.
        momentum: How much of the moving statistics is kept when a batch comes.
        epsilon: Added to the variance, in its unit.
        center: Whether there is a learned `beta`.
        scale: Whether there is a learned `gamma`.
        beta_initializer: What beta starts from.
        gamma_initializer: What gamma starts from.
        moving_mean_initializer: What the moving mean starts from.
        moving_variance_initializer: What the moving variance starts from.
        beta_regularizer: Adds to the loss for beta, or None.
        gamma_regularizer: Adds to the loss for gamma, or None.
        beta_constraint: Is applied to beta after an update, or None.
        gamma_constraint: Is applied to gamma after an update, or None.
        activation: `"relu"`, `"leaky_relu"`, `"elu"`, `"silu"`, `"gelu"`, `"sigmoid"`, `"tanh"`,
            `"relu6"`, `"hardswish"`, or a pair with the slope or alpha, as `("leaky_relu", 0.2)`;
            part of the same call.
        kwargs: By keyword, whatever else the installed Keras's layer takes: `name`, `dtype`,
            `trainable`, `synchronized` (which Keras refuses on this backend), and `renorm`,
            `renorm_clipping`, `renorm_momentum` where Keras has them.

    Shape:
        - inputs: any, with C channels along `axis`
        - mask: that of the inputs without their last dimension, as Keras's layers make it
        - output: that of the inputs, in the dtype policy's compute dtype

    Raises:
        ValueError: A setting cannot be.

    Example:
        >>> import keras, numpy as np
        >>> from batchnorm.keras import BatchNormalization
        >>> layer = BatchNormalization(momentum=0.9, activation="relu")
        >>> x = np.array([[3.0], [5], [8], [9], [11], [24]], "float32")
        >>> keras.ops.convert_to_numpy(layer(x, training=True)).ravel().round(3)
        array([0.   , 0.   , 0.   , 0.   , 0.147, 2.064], dtype=float32)
        >>> [weight.numpy().round(2).item() for weight in layer.non_trainable_weights]
        [1.0, 5.5]

    Source:
        Ioffe & Szegedy, Batch Normalization, 2015 (arXiv:1502.03167); with `renorm`, Ioffe, Batch
        Renormalization, 2017 (arXiv:1702.03275).
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        activation: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        if isinstance(activation, list):  # a pair, as a file has it
            activation = tuple(activation)
        parsed = Activation.parse(activation)
        self.activation = None if parsed is None else parsed.spec
        self._recent: Recent[tuple[Tensor, Tensor]] = Recent()

    def get_config(self) -> dict[str, Any]:
        """Return the settings, from which `from_config` makes the layer again.

        Example:
            >>> from batchnorm.keras import BatchNormalization
            >>> BatchNormalization(activation="relu").get_config()["activation"]
            'relu'
        """
        return {**super().get_config(), "activation": self.activation}

    def add_weight(self, *args: Any, trainable: bool = True, **kwargs: Any) -> Any:
        """Return a new weight as Keras makes it, a statistic in float32 or wider.

        Args:
            args: As Keras takes them.
            trainable: Whether it is learned, and is no statistic.
            kwargs: As Keras takes them.

        Example:
            >>> from batchnorm.keras import BatchNormalization
            >>> layer = BatchNormalization(dtype="bfloat16")
            >>> layer.build((None, 3))
            >>> layer.gamma.dtype, layer.moving_mean.dtype
            ('bfloat16', 'float32')
        """
        if not trainable and self.variable_dtype in ("float16", "bfloat16"):
            kwargs["dtype"] = "float32"
        return super().add_weight(*args, trainable=trainable, **kwargs)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the call as the `keras.RematScope` of the layer has it.

        Under its mode `"activations"` the call stays as it is: what it keeps for the backward pass
        is its input alone, with an activation, too.

        Args:
            layer_call: What a call of the layer runs.
            args: What it is called with.
            kwargs: Likewise.

        Example:
            >>> import keras, numpy as np
            >>> from batchnorm.keras import BatchNormalization
            >>> with keras.RematScope(mode="activations"):
            ...     layer = BatchNormalization(activation="relu")
            >>> tuple(layer(np.ones((4, 3), "float32"), training=True).shape)
            (4, 3)
        """
        if self._remat_mode is not None and self._remat_mode.mode == "activations":
            return layer_call
        return super().rematerialized_call(layer_call, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Return the normalized batch.

        Args:
            inputs: The batch, with its channels along `axis`.
            training: Whether the batch's own moments normalize it, and the moving ones follow.
            mask: The positions that count in the moments, in the shape of the inputs without their
                last dimension, or None for all.

        Raises:
            ValueError: The mask has another number of dimensions.
            TypeError: `inputs` are complex.
            RuntimeError: `inputs` have another number of channels than the layer, a backend of
                this package was forced that cannot serve the call, or a checkpoint recomputes a
                call with `renorm` that is long ago, or is compiled.

        Example:
            >>> import numpy as np
            >>> from batchnorm.keras import BatchNormalization
            >>> sequences = np.ones((2, 5, 3), "float32")
            >>> steps = np.arange(5) < np.array([[5], [2]])
            >>> tuple(BatchNormalization()(sequences, training=True, mask=steps).shape)
            (2, 5, 3)
        """
        x = keras.ops.convert_to_tensor(inputs)
        if keras.backend.standardize_dtype(x.dtype) != self.compute_dtype:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        weights = None if mask is None else _weights(mask, x)
        if training and self.trainable:
            y = self._normalize_by_batch(x, weights)
        else:
            y = batch_norm(
                x,
                self.moving_mean.value,
                self.moving_variance.value,
                _value(self.gamma),
                _value(self.beta),
                eps=self.epsilon,
                channel_dim=self.axis,
                activation=self.activation,
            )
        return keras.ops.cast(y, self.compute_dtype)

    def _normalize_by_batch(self, x: Tensor, mask: Tensor | None) -> Tensor:
        gamma, beta = _value(self.gamma), _value(self.beta)
        if not getattr(self, "renorm", False):  # which older Kerases do not have
            y, batch = self._normalize(x, mask, gamma, beta)
            self._follow(batch, self.momentum, moving_mean=batch.mean, moving_variance=batch.var)
            return y
        with torch.no_grad():
            batch = self._normalize(x, mask, None, None)[1]
            scale, shift = self._correction(batch)
        weight = scale if gamma is None else scale * gamma
        bias = shift if gamma is None else shift * gamma
        y = self._normalize(x, mask, weight, bias if beta is None else bias + beta)[0]
        std = (batch.var + self.epsilon).sqrt()
        rate = self.renorm_momentum
        self._follow(batch, rate, renorm_mean=batch.mean, renorm_stddev=std)
        self._follow(batch, self.momentum, moving_mean=batch.mean, moving_stddev=std)
        variance = (self.moving_stddev.value.square() - self.epsilon).clamp(min=0)
        self._follow(batch, 0.0, moving_variance=variance)
        return y

    def _normalize(
        self, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, _Batch]:
        """Return y and the moments that `batch_norm` found: what statistics of 0 become by them."""
        dtype = torch.promote_types(x.dtype, torch.float32)

        def run(x: Tensor, mask: Tensor | None, at: slice) -> tuple[Tensor, _Batch]:
            zeros = x.new_zeros(x.shape[self.axis], dtype=dtype)
            y, (mean, var, updates) = batch_norm(
                x,
                State(zeros, zeros, zeros.new_zeros((), dtype=torch.int64)),
                weight=None if weight is None else weight[at],
                bias=None if bias is None else bias[at],
                training=True,
                momentum=1.0,
                eps=self.epsilon,
                mask=mask,
                activation=self.activation,
                channel_dim=self.axis,
                on_small_batch="skip",
            )
            assert updates is not None  # they were given
            good = (updates > 0).expand_as(mean)
            return y, _Batch(mean, var * _biased(x, mask, self.axis), good)

        if mask is None or mask.shape[self.axis] == 1:
            return run(x, mask, slice(None))
        alone = [  # each channel has its positions
            run(x.narrow(self.axis, c, 1), mask.narrow(self.axis, c, 1), slice(c, c + 1))
            for c in range(x.shape[self.axis])
        ]
        batches = zip(*(batch for _, batch in alone), strict=True)
        return torch.cat([y for y, _ in alone], self.axis), _Batch._make(map(torch.cat, batches))

    def _correction(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Return the r and d of batch renormalization, in a recomputation those of its call.

        By then the weights have moved. What a checkpoint recomputes has the same moments as before,
        so these say which call it was.
        """
        if is_transformed():
            return self._new_correction(batch)
        if torch.compiler.is_compiling():
            r, d = self._new_correction(batch)
            if is_compiling():
                r = torch.ops.batchnorm.not_again.default(operators.snapshot(r))
                d = operators.snapshot(d)
            return r, d
        if not in_backward():
            found = self._new_correction(batch)
            self._recent.add(batch.mean, found)
            return found
        again = self._recent.find(batch.mean)
        if again is None:
            raise RuntimeError(
                f"a checkpoint recomputes a call of {self.name!r} that is not among the last "
                f"{Recent.size}, and the statistics that renorm corrected it by are gone: run the "
                "backward pass sooner after its forward pass"
            )
        return again

    def _new_correction(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        given = {name: at for name, at in self.renorm_clipping.items() if at is not None}
        low, high = given.get("rmin", 0.0), given.get("rmax", math.inf)
        furthest = given.get("dmax", math.inf)
        std = self.renorm_stddev.value.clamp(min=math.sqrt(self.epsilon))
        r = ((batch.var + self.epsilon).sqrt() / std).clamp(low, high)
        d = ((batch.mean - self.renorm_mean.value) / std).clamp(-furthest, furthest)
        return torch.where(batch.good, r, 1), torch.where(batch.good, d, 0)

    def _follow(self, batch: _Batch, momentum: float, **found: Tensor) -> None:
        """Move weights towards what was found in a batch, unless it is one to leave out.

        A recomputation of a checkpoint moves nothing.
        """
        good = batch.good
        if is_compiling():
            good = good & ~operators.is_recomputation(good)
        elif not torch.compiler.is_compiling() and in_backward():
            return
        for name, new in found.items():
            variable = getattr(self, name)
            old = variable.value
            moved = old * momentum + new * (1 - momentum)
            variable.assign(torch.where(good, moved, old))


def _value(variable: Any) -> Tensor | None:
    return None if variable is None else variable.value


def _weights(mask: Any, x: Tensor) -> Tensor:
    """Return a mask of Keras, which knows no last dimension, in the rank of the batch."""
    weights: Tensor = keras.ops.cast(mask, "bool")
    if weights.ndim != x.ndim - 1:
        raise ValueError(
            f"mask is of size {tuple(weights.shape)}: expected the inputs' size {tuple(x.shape)} "
            "without its last dimension, as Keras's layers make masks"
        )
    return weights.unsqueeze(-1)


def _biased(x: Tensor, mask: Tensor | None, axis: int) -> Tensor | float:
    """Return what makes the unbiased variance the biased one: (m - 1) / m of m values."""
    count: Tensor | float
    if mask is None:
        count = x.numel() / max(x.shape[axis], 1)
        return (count - 1) / count if count else 1.0
    size = list(x.shape)
    size[axis] = mask.shape[axis]
    count = mask.expand(size).sum([dim for dim in range(x.ndim) if dim != axis % x.ndim])
    return (count - 1) / count.clamp(min=1)
