"""Batch norms of other packages: what each is as one of ours, found out by running a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.kernels.activations import NAMES, Activation
from batchnorm.layers import BatchNorm, FrozenBatchNorm
from batchnorm.models.adopt import OURS, become, group_of

_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
#: What may follow the normalization, by the names that timm gives it.
_AFTER = {"drop", "act"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: What is tried where no attribute says it.
_EPS = (1e-5, 1e-3, 1e-6)
#: Of the float64 numbers that are compared: far above rounding, far below another eps.
_TOLERANCE = 1e-9

_Spec = str | tuple[str, float] | None


class UncountedFrozenBatchNorm(FrozenBatchNorm):
    """A frozen layer that counts no batches, as those of other packages."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # an old file may have a count, and torch.nn adds one to a file of a version before its own
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *args)


class Recipe(NamedTuple):
    """What makes one of ours of a layer.

    Attributes:
        ours: The class that it becomes.
        given: The attributes that it has as one of ours.
    """

    ours: type[BatchNorm]
    given: dict[str, Any]


def recipe_for(layer: nn.Module) -> Recipe | str:
    """Return what makes one of ours of a layer whose class is none of torch, or why nothing does.

    Nothing is taken for granted: a copy in float64 on the CPU is run with random numbers, in
    training and in evaluation, and beside it what it would be as one of ours. What both return,
    the gradients and the running statistics have to agree.

    Args:
        layer: The layer, left alone.
    """
    name, reason = type(layer).__name__, _why_unlike(layer)
    if reason is not None:
        return reason
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),  # for what its forward may draw
        ):
            act = layer._modules.get("act")
            activations = _activations(act)
            if not activations:
                return f"its activation, {type(act).__name__}, is none that batchnorm has"
            for ours, given, ranks in _candidates(layer, activations[0]):
                same = tuple(rank for rank in ranks if _agree(layer, Recipe(ours, given), rank))
                if same:
                    return Recipe(ours, given if same == ours.ranks else {**given, "ranks": same})
    except Exception as error:  # whatever the code of others raises
        return f"it is a {name}, of which no copy could be run: {type(error).__name__}: {error}"
    kind = "batch normalization" if isinstance(layer, _BatchNorm) else "frozen batch normalization"
    return f"it is a {name}, and a copy of it did not compute {kind}"


def _why_unlike(layer: nn.Module) -> str | None:
    """Return why a layer is no batch norm with an activation, as far as its parts tell."""
    name, children = type(layer).__name__, dict(layer.named_children())
    if is_parametrized(layer):
        return "it is parametrized: remove the parametrizations first"
    if isinstance(layer, _BatchNorm) and children.keys() != _AFTER:
        return f"it is a {name}, a subclass: what its forward does is not known"
    others = ({*layer._parameters, *layer._buffers} - _TENSORS) | (children.keys() - _AFTER)
    if others:
        return f"it is a {name}, which has more: {', '.join(sorted(others))}"
    mean, var = (layer._buffers.get(each) for each in ("running_mean", "running_var"))
    if mean is not None and (var is None or mean.dim() != 1 or var.shape != mean.shape):
        return f"it is a {name}, whose statistics are not one number a channel"
    drop = children.get("drop")
    if drop is not None and type(drop) is not nn.Identity:
        return f"it drops part of its output, by a {type(drop).__name__}"
    inside = [module for child in children.values() for module in child.modules()]
    if any(getattr(module, hooks) for module in inside for hooks in _HOOKS):
        return "its activation has hooks, which would not be called any more"
    return None


def _candidates(
    layer: nn.Module, activation: _Spec
) -> Iterator[tuple[type[BatchNorm], dict[str, Any], tuple[int, ...]]]:
    """Yield what a layer may be as one of ours, and for batches of which ranks."""
    given: dict[str, Any] = {"activation": activation}
    for theirs, ours in OURS.items():
        if isinstance(layer, theirs):
            yield ours, {**given, **group_of(layer)}, ours.ranks or (4,)
            return
    counted = layer._buffers.get("num_batches_tracked") is not None
    tensors = {name: getattr(layer, name, None) for name in ("weight", "bias")}
    given |= {name: None for name, values in tensors.items() if values is None}
    given |= {
        "num_features": len(layer.get_buffer("running_mean")),
        "momentum": 0.1,
        "affine": tensors["weight"] is not None,
        "track_running_stats": True,
        "statistics": "running",
        "update": "never",
    }
    own = getattr(layer, "eps", None)
    for eps in dict.fromkeys([*([own] if isinstance(own, float | int) else []), *_EPS]):
        yield (
            FrozenBatchNorm if counted else UncountedFrozenBatchNorm,
            {**given, "eps": eps},
            (4, 3, 2, 5),
        )


def _activations(act: nn.Module | None) -> list[_Spec]:
    """Return the settings of ours that make of numbers what a module does: one, or none."""
    if act is None:
        return [None]
    if [*act.parameters(), *act.buffers()]:
        return []
    z = torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu")
    values = act(z.clone())
    if torch.equal(values, z):
        return [None]
    at = int((z == -1).nonzero())
    for name in NAMES:
        found = Activation.parse(name)
        assert found is not None
        if found.parameter is not None:  # of all of them a factor of what is below 0
            unit = Activation(name, 1.0)(z)[at]
            found = Activation(name, round(float(values[at] / unit), 12))
        if torch.allclose(values, found(z), rtol=_TOLERANCE, atol=_TOLERANCE):
            return [found.spec]
    return []


def _agree(layer: nn.Module, recipe: Recipe, rank: int) -> bool:
    """Return whether a layer computes what one of ours does, for batches of a rank."""
    theirs = _twin(layer)
    ours = copy.deepcopy(theirs)
    channels = become(ours, *recipe, "convert").num_features
    numbers = torch.Generator("cpu").manual_seed(0)
    shape = (4, channels, *[2] * (rank - 2))
    if _returns_another(shape, theirs):
        return False
    for training in (True, True, False):  # twice, for an average over all batches
        x, dy = torch.randn((2, *shape), generator=numbers, dtype=torch.float64, device="cpu")
        try:
            found, expected = (_run(each.train(training), x, dy) for each in (theirs, ours))
        except Exception:  # as of a rank that it does not take
            return False
        if not all(map(_is_close, found, expected)):
            return False
    return True


def _returns_another(shape: tuple[int, ...], layer: nn.Module) -> bool:
    """Return whether a layer broadcasts a batch to another shape, which may be a huge one."""
    try:
        x = torch.empty(shape, dtype=torch.float64, device="meta")
        return bool(copy.deepcopy(layer).to("meta").eval()(x).shape != x.shape)
    except Exception:  # it may not run without values
        return False


def _run(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Return the output, the gradients of a random function of it, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    y = layer(x * 1)  # which a layer may write over
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in layer.buffers())]


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)


def _twin(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer without its hooks, with random numbers, in float64 on the CPU."""
    bare = copy.copy(layer)
    for name, value in vars(layer).items():
        if "_hooks" in name:  # whose objects may be anything, the whole model, say
            bare.__dict__[name] = type(value)()
    twin = copy.deepcopy(bare).double().to_empty(device="cpu").requires_grad_()
    numbers = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.01 if name == "running_var" else -2, 2, generator=numbers)
            else:
                tensor.zero_()
    return twin
