"""The conventions of Keras and Flax: their settings and weights, there and back, without either.

| | PyTorch, and here | Keras | Flax |
| --- | --- | --- | --- |
| momentum | share of the new batch | share of what is kept | share of what is kept |
| running variance | takes m / (m - 1) times the batch's | takes the batch's | takes the batch's |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from batchnorm.layers import BankedBatchNorm, BatchNorm, BatchRenorm

Array = NDArray[np.float32]

#: The settings of a Keras layer that a layer here has, too, with Keras's defaults.
_KERAS = {
    "axis": -1,
    "momentum": 0.99,
    "epsilon": 1e-3,
    "center": True,
    "scale": True,
    "trainable": True,
    "activation": None,
}

#: Those that change no number once the weights are there.
_KERAS_IGNORED = (
    "name", "dtype", "beta_initializer", "gamma_initializer", "moving_mean_initializer",
    "moving_variance_initializer", "renorm_clipping", "renorm_momentum",
)  # fmt: skip

#: Those that a layer here does not have: the value that means "without", and the way out.
_KERAS_WITHOUT = {
    "beta_regularizer": (None, "add the penalty to the loss, and set it to None"),
    "gamma_regularizer": (None, "add the penalty to the loss, and set it to None"),
    "beta_constraint": (None, "apply it after the optimizer's step, and set it to None"),
    "gamma_constraint": (None, "apply it after the optimizer's step, and set it to None"),
    "synchronized": (False, "synchronize the model after the conversion, and set it to False"),
    "renorm": (
        False,
        "for inference, which is the same without it, set it to False and leave out the weights "
        "after moving_variance",
    ),
}

#: The same of `flax.linen.BatchNorm`.
_FLAX = {
    "axis": -1,
    "momentum": 0.99,
    "epsilon": 1e-5,
    "use_bias": True,
    "use_scale": True,
    "use_running_average": None,
}
_FLAX_IGNORED = (
    "name", "parent", "dtype", "param_dtype", "bias_init", "scale_init", "use_fast_variance",
    "force_float32_reductions",
)  # fmt: skip
_FLAX_WITHOUT = {
    "axis_name": (None, "synchronize the model after the conversion, and set it to None"),
    "axis_index_groups": (None, "synchronize the model after the conversion, and set it to None"),
}


def from_keras(config: Mapping[str, Any], weights: Sequence[ArrayLike]) -> BatchNorm:
    """Return the layer that a batch normalization layer of Keras is.

        channel_dim = axis     momentum = 1 - momentum_keras     eps = epsilon

    In inference its numbers are those of the Keras layer. In training, too, but for the running
    variance: Keras takes the variance of the batch as it is, and the layer here m / (m - 1) times
    that, m being the number of values a channel.

    A layer here has no bias without a weight. So with `center` and without `scale` the weight is
    ones and requires no gradient. With `trainable=False`, which in Keras means inference, too, the
    layer has `statistics="running"` and `update="never"`, and no parameter requires a gradient.

    Args:
        config: What `layer.get_config()` gives, or a part of it; what is left out has Keras's
            default. Initializers, names and dtypes change nothing.
        weights: What `layer.get_weights()` gives, each (C,): gamma if `scale`, beta if `center`,
            moving mean, moving variance.

    Returns:
        A new layer of any rank, float32, in training mode.

    Raises:
        ValueError: There is a setting that the layer cannot have, or the weights are not those of
            the settings.

    Example:
        >>> import numpy as np
        >>> ones = np.ones(3, "float32")
        >>> config = {"axis": 3, "momentum": 0.99, "epsilon": 0.001}
        >>> from_keras(config, [2 * ones, ones, 0 * ones, 4 * ones])
        BatchNorm(3, eps=0.001, momentum=0.01, ..., channel_dim=3)

    Source:
        keras.layers.BatchNormalization, Keras 3.
    """
    found = _settings("config", config, _KERAS, _KERAS_IGNORED, _KERAS_WITHOUT)
    scale, center = _flag("scale", found["scale"]), _flag("center", found["center"])
    names = [*["gamma"] * scale, *["beta"] * center, "moving_mean", "moving_variance"]
    if len(weights) != len(names):
        raise ValueError(
            f"weights are {len(weights)} arrays: expected {len(names)}, {', '.join(names)}, as "
            f"config has scale={scale} and center={center}"
        )
    frozen = not _flag("trainable", found["trainable"])
    layer = _build(found, dict(zip(names, weights, strict=True)), frozen)
    return layer.requires_grad_(False) if frozen else layer


def to_keras(layer: BatchNorm) -> tuple[dict[str, Any], list[Array]]:
    """Return the settings and weights with which a Keras layer is this one.

        axis = channel_dim     momentum_keras = 1 - momentum     epsilon = eps

    `keras.layers.BatchNormalization.from_config(config)`, once it is built, takes the weights by
    `set_weights`. In inference its numbers are those of the layer; in training its moving variance
    takes the variance of a batch without the factor m / (m - 1).

    A weight of ones that requires no gradient becomes `scale=False`. A layer with
    `statistics="running"` and `update="never"`, as `FrozenBatchNorm` is one, becomes
    `trainable=False`. An activation is in the settings only where there is one, and only
    `batchnorm.keras.BatchNormalization` takes it. What concerns one value a channel and memory,
    `on_small_batch` and `inplace`, is left out, and so is the mode.

    Args:
        layer: Of any rank; no `BatchRenorm` or `BankedBatchNorm`.

    Returns:
        config: Settings by Keras's names.
        weights: Float32, each (C,): gamma if `scale`, beta if `center`, moving mean, moving
            variance.

    Raises:
        ValueError: The layer has a setting that Keras does not have.
        TypeError: It is another kind of layer.

    Example:
        >>> import batchnorm as bn
        >>> config, weights = to_keras(bn.BatchNorm2d(3))
        >>> config["axis"], config["momentum"], config["epsilon"], len(weights)
        (1, 0.9, 1e-05, 4)
    """
    momentum, frozen, statistics = _check(layer, "Keras")
    scale, center = _parameters(layer)
    if frozen and any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
        raise ValueError(
            "the layer normalizes by its running statistics, and has parameters that are trained, "
            "which in Keras exclude each other: call layer.requires_grad_(False)"
        )
    config: dict[str, Any] = {
        "axis": layer.channel_dim,
        "momentum": momentum,
        "epsilon": layer.eps,
        "center": center is not None,
        "scale": scale is not None,
        "trainable": not frozen,
    }
    if layer.activation is not None:
        config["activation"] = layer.activation
    tensors = (scale, center, *statistics)
    return config, [_to_numpy(tensor) for tensor in tensors if tensor is not None]


def from_flax(
    settings: Mapping[str, Any], variables: Mapping[str, Mapping[str, ArrayLike]]
) -> BatchNorm:
    """Return the layer that a `flax.linen.BatchNorm` is.

        channel_dim = axis     momentum = 1 - momentum_flax     eps = epsilon

    In inference its numbers are those of the Flax module. In training, too, but for the running
    variance: Flax takes the variance of the batch as it is, and the layer here m / (m - 1) times
    that, m being the number of values a channel.

    A layer here has no bias without a weight. So with `use_bias` and without `use_scale` the weight
    is ones and requires no gradient. With `use_running_average=True` the layer has
    `statistics="running"` and `update="never"`.

    Args:
        settings: The fields of the module by name, or some of them; what is left out has Flax's
            default. Initializers, names and dtypes change nothing.
        variables: What `module.init` gives: `{"params": {"scale", "bias"}, "batch_stats": {"mean",
            "var"}}`, each (C,), without what `use_scale` and `use_bias` exclude.

    Returns:
        A new layer of any rank, float32, in training mode.

    Raises:
        ValueError: There is a setting that the layer cannot have, or the variables are not those
            of the settings.

    Example:
        >>> import numpy as np
        >>> ones = np.ones(3, "float32")
        >>> statistics = {"mean": 0 * ones, "var": 4 * ones}
        >>> variables = {"params": {"scale": 2 * ones, "bias": ones}, "batch_stats": statistics}
        >>> from_flax({"momentum": 0.9}, variables)
        BatchNorm(3, eps=1e-05, momentum=0.1, ..., channel_dim=-1)

    Source:
        flax.linen.BatchNorm.
    """
    found = _settings("settings", settings, _FLAX, _FLAX_IGNORED, _FLAX_WITHOUT)
    scale, bias = _flag("use_scale", found["use_scale"]), _flag("use_bias", found["use_bias"])
    given = {
        f"{group}/{name}": array
        for group, arrays in variables.items()
        for name, array in arrays.items()
    }
    names = {
        **({"params/scale": "gamma"} if scale else {}),
        **({"params/bias": "beta"} if bias else {}),
        "batch_stats/mean": "moving_mean",
        "batch_stats/var": "moving_variance",
    }
    if set(given) != set(names):
        raise ValueError(
            f"variables hold {', '.join(sorted(given)) or 'nothing'}: expected {', '.join(names)}, "
            f"as settings have use_scale={scale} and use_bias={bias}"
        )
    frozen = _flag("use_running_average", found["use_running_average"] or False)
    return _build(found, {name: given[theirs] for theirs, name in names.items()}, frozen)


def to_flax(layer: BatchNorm) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """Return the settings and variables with which a `flax.linen.BatchNorm` is this layer.

        axis = channel_dim     momentum_flax = 1 - momentum     epsilon = eps

    `flax.linen.BatchNorm(**settings).apply(variables, x, use_running_average=True)` has the
    layer's numbers; in training its variance takes that of a batch without the factor m / (m - 1).

    A weight of ones that requires no gradient becomes `use_scale=False`. A layer with
    `statistics="running"` and `update="never"`, as `FrozenBatchNorm` is one, becomes
    `use_running_average=True`; otherwise the settings do not say, and Flax is told with every call.
    What concerns one value a channel and memory, `on_small_batch` and `inplace`, is left out.

    Args:
        layer: Of any rank; no `BatchRenorm` or `BankedBatchNorm`.

    Returns:
        settings: Arguments of the module.
        variables: `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}`, float32, each
            (C,), without the parameters that the layer does not have.

    Raises:
        ValueError: The layer has a setting that Flax does not have.
        TypeError: It is another kind of layer.

    Example:
        >>> import batchnorm as bn
        >>> settings, variables = to_flax(bn.BatchNorm(3, channel_dim=-1))
        >>> settings["axis"], settings["momentum"], sorted(variables["params"])
        (-1, 0.9, ['bias', 'scale'])
    """
    momentum, frozen, (mean, var) = _check(layer, "Flax")
    if layer.activation is not None:
        raise ValueError(
            f"the layer has activation={layer.activation!r}, and Flax's has none: convert one "
            "without it, and apply it to what the module returns"
        )
    scale, bias = _parameters(layer)
    settings = {
        "axis": layer.channel_dim,
        "momentum": momentum,
        "epsilon": layer.eps,
        "use_bias": bias is not None,
        "use_scale": scale is not None,
    }
    if frozen:
        settings["use_running_average"] = True
    groups: dict[str, dict[str, Tensor | None]] = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    variables = {
        group: {name: _to_numpy(tensor) for name, tensor in tensors.items() if tensor is not None}
        for group, tensors in groups.items()
    }
    return settings, {group: arrays for group, arrays in variables.items() if arrays}


def _settings(
    name: str,
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    ignored: Sequence[str],
    without: Mapping[str, tuple[Any, str]],
) -> dict[str, Any]:
    """Return the settings that a layer here has, too, after a look at all others."""
    for key, value in given.items():
        if key in without:
            expected, way_out = without[key]
            if value != expected:
                raise ValueError(
                    f"{name} has {key}={value!r}: expected {expected}, since the layer here has no "
                    f"such setting; {way_out}"
                )
        elif key not in known and key not in ignored:
            raise ValueError(
                f"{name} has {key}={value!r}: expected only {', '.join([*known, *without])}, or "
                f"what changes no number, {', '.join(ignored)}; leave it out if it does not, either"
            )
    return {key: given.get(key, default) for key, default in known.items()}


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}: expected True or False")
    return bool(value)


def _channel_dim(axis: Any) -> int:
    if isinstance(axis, list | tuple) and len(axis) == 1:
        (axis,) = axis
    if isinstance(axis, bool) or not isinstance(axis, Integral):
        raise ValueError(
            f"axis is {axis!r}: expected one integer, the channels' dimension; of several make one "
            "by x.flatten, and flatten the weights likewise"
        )
    return int(axis)


def _complement(momentum: Any) -> float:
    """Return 1 - momentum, of the number as it is written: 0.01 and not 0.010000000000000009."""
    if not _is_number(momentum) or not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum is {momentum!r}: expected a number between 0 and 1, the share of the old "
            "statistics that is kept"
        )
    return float(1 - Decimal(str(momentum)))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _build(settings: Mapping[str, Any], given: Mapping[str, ArrayLike], frozen: bool) -> BatchNorm:
    """Return a layer of the settings, whose weights go by Keras's names."""
    epsilon = settings["epsilon"]
    if not _is_number(epsilon) or not epsilon > 0:
        raise ValueError(
            f"epsilon is {epsilon!r}: expected a positive number, which is added to the variance; "
            "for almost none take 1e-12"
        )
    arrays = {name: np.array(array, dtype=np.float32) for name, array in given.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        listed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"the shapes are {listed}: expected (C,) for all, a number for each of the same C "
            "channels; check that they come from one layer, in its order"
        )
    weight, bias = arrays.get("gamma"), arrays.get("beta")
    (num_features,) = arrays["moving_mean"].shape
    layer = BatchNorm(
        num_features,
        eps=float(epsilon),
        momentum=_complement(settings["momentum"]),
        affine=weight is not None or bias is not None,
        bias=bias is not None,
        channel_dim=_channel_dim(settings["axis"]),
        activation=_activation(settings.get("activation")),
        statistics="running" if frozen else "mode",
        update="never" if frozen else "training",
    )
    state = {
        "weight": weight,
        "bias": bias,
        "running_mean": arrays["moving_mean"],
        "running_var": arrays["moving_variance"],
    }
    tensors = {name: torch.from_numpy(array) for name, array in state.items() if array is not None}
    layer.load_state_dict(tensors, strict=False)
    if weight is None and bias is not None:
        layer.weight.requires_grad_(False)
    return layer


def _activation(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given  # a pair, as a file has it


def _check(layer: BatchNorm, framework: str) -> tuple[float, bool, tuple[Tensor, Tensor]]:
    """Return the other framework's momentum, whether nothing updates, and the statistics."""
    if not isinstance(layer, BatchNorm) or isinstance(layer, BatchRenorm | BankedBatchNorm):
        raise TypeError(
            f"layer is a {type(layer).__name__}: expected a BatchNorm that is no BatchRenorm or "
            "BankedBatchNorm; for inference, load what it normalizes by into a BatchNorm"
        )
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(
            f"the layer has track_running_stats=False, and {framework}'s always has statistics: "
            "calibrate one that has them"
        )
    frozen = (layer.statistics, layer.update) == ("running", "never")
    settings = {
        "correction": (0,),
        "ghost_size": (None,),
        "process_group": (None,),
        "statistics": ("running",) if frozen else ("mode",),
        "update": ("never",) if frozen else ("training", "grad"),
    }
    for name, expected in settings.items():
        if (value := getattr(layer, name)) not in expected:
            raise ValueError(
                f"the layer has {name}={value!r}, and {framework}'s has no such setting: set it to "
                f"{expected[0]!r}, which changes nothing in inference"
            )
    if layer.momentum is None:
        raise ValueError(
            f"the layer has momentum=None, the average over all batches, which {framework} does "
            "not have: set it to a number, which changes nothing in inference"
        )
    return _complement(layer.momentum), frozen, (layer.running_mean, layer.running_var)


def _parameters(layer: BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias, and None for a weight of ones that stays so."""
    weight: Tensor | None = layer.weight
    if weight is not None and not weight.requires_grad and bool((weight == 1).all()):
        weight = None
    return weight, layer.bias


def _to_numpy(tensor: Tensor) -> Array:
    return np.array(tensor.detach().to("cpu", torch.float32))
