"""Copies of a module to fold in, and what is noted of a call of one."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.layers import BatchNorm
from batchnorm.models.adopt import OURS
from batchnorm.models.convert import convert, revert
from batchnorm.models.walk import batch_norms

T = TypeVar("T")


def copy_of(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy whose batch norms of other packages are ours, and why some are not.

    Args:
        model: The model.
    """
    new, others = copy.deepcopy(model), _others(model)
    left = convert(new, where=lambda name, _: name in others).left if others else {}
    return new, left


def revert_copy(new: nn.Module, model: nn.Module) -> None:
    """Give the layers that `copy_of` converted their classes again.

    Args:
        new: The copy, in which some may be gone.
        model: The model that it is a copy of.
    """
    others = _others(model) & batch_norms(new, alike=True).keys()
    if others:
        revert(new, where=lambda name, _: name in others)


def _others(model: nn.Module) -> set[str]:
    """Return the names of the batch norms that are neither of torch nor ours."""
    return {
        name
        for name, layer in batch_norms(model, alike=True).items()
        if type(layer) not in OURS and not isinstance(layer, BatchNorm)
    }


@contextmanager
def observed(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """Note how each module is called inside.

    Args:
        modules: They, by name.

    Yields:
        By name, how many arguments each call had.
    """
    calls: dict[str, list[int]] = defaultdict(list)

    def noting(name: str) -> Callable[..., None]:
        return lambda _, args, keywords: calls[name].append(len(args) + len(keywords))

    handles = [
        module.register_forward_pre_hook(noting(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def cloned(values: T) -> T:
    """Return arguments or outputs, with new tensors in them."""
    new: T = pytree.tree_map_only(Tensor, torch.clone, values)
    return new


def set_values(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor memory of its own with these values, in its type and memory format.

    Args:
        tensor: The tensor, which may lie in memory that others have, too.
        values: Its values from now on.
    """
    tensor.data = torch.empty_like(tensor.data).copy_(values)


@contextmanager
def seeded(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let what draws numbers draw the same ones each time, and none of those that come later.

    Args:
        tensors: Those of the model.
    """
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        yield
