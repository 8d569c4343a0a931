"""Keeping for the backward pass how a tensor is made, in place of the tensor.

The output of a batch norm with its activation is an elementwise function of what the batch norm
keeps anyway: its input, two numbers a channel, and the residual. So where the next layer would keep
that output, a `Recipe` is kept, and followed in the backward pass, when the layer asks. A residual
that is such an output itself is kept as its recipe, too, and so on along the blocks of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm.functional.operators import form_of
from batchnorm.kernels import Given, choose

#: How many recipes may follow on each other: then a tensor is kept, from which the next begin.
_DEPTH = 64


_weak: Callable[..., Any] = StorageWeakRef


class Kept:
    """A tensor that is kept, for a recipe or as it is.

    Autograd does not ask by itself whether something has changed that goes through hooks.

    Args:
        tensor: The tensor.
    """

    depth = 0
    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def tensor(self) -> Tensor:
        """Return it.

        Raises:
            RuntimeError: It has changed since.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of size {tuple(self._tensor.shape)} is at version "
                f"{self._tensor._version}, expected version {self._version}. Do not change it "
                "between the forward and the backward pass, or clone it before"
            )
        return self._tensor


class Recipe:
    """How to make a tensor again; once made, it lasts as long as anything waits for it.

    Args:
        y: The tensor.
        make: Makes it of the tensors that the sources have.
        sources: What it is made of.
    """

    __slots__ = ("_made", "_make", "_sources", "_version", "depth", "dtype", "layout", "storage")

    def __init__(
        self, y: Tensor, make: Callable[..., Tensor], sources: tuple[Kept | Recipe | None, ...]
    ) -> None:
        self.storage: Any = _weak(y.untyped_storage())
        self.layout, self.dtype = (y.size(), y.stride(), y.storage_offset()), y.dtype
        self.depth: int = 1 + max((s.depth for s in sources if s is not None), default=0)
        self._version, self._make, self._sources = y._version, make, sources
        self._made: Tensor | None = None

    def makes(self, tensor: Tensor) -> bool:
        """Return whether a tensor, which has the memory of this one, has its values still."""
        return tensor._version == self._version and not self.storage.expired()

    def tensor(self) -> Tensor:
        """Return the tensor, made again."""
        if self._made is None:
            with torch.no_grad():
                given = (None if s is None else s.tensor() for s in self._sources)
                made = self._make(*given)
            if (made.size(), made.stride(), made.storage_offset()) != self.layout:
                size, stride, _ = self.layout
                made = torch.empty_strided(
                    size, stride, dtype=made.dtype, device=made.device
                ).copy_(made)
            self._made = made
        return self._made


class Waiting:
    """What autograd keeps in place of a tensor that is made again, or of a view of one.

    Args:
        recipe: Of the tensor.
        tensor: The tensor or the view.
    """

    __slots__ = ("_view", "recipe")

    def __init__(self, recipe: Recipe, tensor: Tensor) -> None:
        view = (tensor.size(), tensor.stride(), tensor.storage_offset())
        self.recipe, self._view = recipe, None if view == recipe.layout else view

    def tensor(self) -> Tensor:
        """Return the tensor or the view, made again."""
        made = self.recipe.tensor()
        if self._view is None:
            return made
        size, stride, offset = self._view
        begin = made.storage_offset() - self.recipe.layout[2]
        return made.as_strided(size, stride, offset + begin)


class Recipes:
    """The recipes of one forward pass, by the memory of what they make.

    Afterwards they are forgotten here, for autograd keeps its hooks, and so this, until the end of
    the backward pass, and a recipe what it has made.
    """

    def __init__(self) -> None:
        self._recipes: dict[int, Recipe] = {}

    def of(self, tensor: Tensor) -> Recipe | None:
        """Return how a tensor, or one that it is a view of, is made, if that is known."""
        if tensor.layout is not torch.strided or not tensor.dtype.is_floating_point:
            return None
        recipe = self._recipes.get(tensor.untyped_storage()._cdata)
        known = recipe is not None and recipe.makes(tensor) and recipe.dtype == tensor.dtype
        return recipe if known else None

    def source(self, tensor: Tensor | None) -> Kept | Recipe | None:
        """Return what keeps a tensor for a recipe: its own recipe, if there is one."""
        if tensor is None:
            return None
        recipe = self.of(tensor)
        if recipe is None or recipe.depth >= _DEPTH:
            return Kept(tensor)
        view = (tensor.size(), tensor.stride(), tensor.storage_offset())
        return recipe if view == recipe.layout else Kept(tensor)

    def add(self, y: Tensor, make: Callable[..., Tensor], *tensors: Tensor | None) -> None:
        """Note how a tensor is made, and of which others."""
        recipe = Recipe(y, make, tuple(self.source(tensor) for tensor in tensors))
        self._recipes[y.untyped_storage()._cdata] = recipe

    def forget(self) -> None:
        """Leave the recipes to what waits for them."""
        self._recipes.clear()

    def pack(self, tensor: Tensor) -> Kept | Waiting:
        """Return what autograd is to keep of a tensor."""
        recipe = self.of(tensor)
        if recipe is None or recipe.depth > _DEPTH:
            return Kept(tensor)
        return Waiting(recipe, tensor)


def unpack(kept: Kept | Waiting) -> Tensor:
    """Return the tensor that `pack` was given."""
    return kept.tensor()


def held_by(kept: Any) -> Iterator[Tensor]:
    """Yield the tensors that are in memory for what autograd keeps: itself, or what makes it."""
    seen, open_ = set[int](), [kept.recipe if isinstance(kept, Waiting) else kept]
    while open_:
        one = open_.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, Kept):
            yield one._tensor
        elif isinstance(one, Recipe):
            open_ += [one._made, *one._sources]


_recipes: ContextVar[Recipes | None] = ContextVar("batchnorm_recipes", default=None)


@contextmanager
def saving_memory(pack: Callable[[Recipes, Tensor], Any] = Recipes.pack) -> Iterator[None]:
    """Let autograd keep recipes, inside, of what `note` is told of.

    Where others have hooks already, as a checkpoint around it or a user's, these decide; and so
    does who forbids them, as `torch.func`.

    Args:
        pack: What it keeps of a tensor.
    """
    hooks: Any = torch._C._autograd
    taken = hooks._top_saved_tensors_default_hooks(True) is not None
    if taken or not (torch.is_grad_enabled() and hooks._saved_tensors_hooks_is_enabled()):
        yield
        return
    recipes = Recipes()
    token = _recipes.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(partial(pack, recipes), unpack):
            yield
    finally:
        _recipes.reset(token)
        recipes.forget()


def note_batch_norm(
    y: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Note how y, which `batch_norm` has returned for these, is made again; return y."""
    recipes, call = _recipes.get(), getattr(y.grad_fn, "call", None)
    if recipes is None or call is None:  # no gradient is recorded, or not by our node
        return y

    def make(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        mean, inverse_std = call.statistics()
        given = Given(x, mean, inverse_std, weight, bias, residual, None, call.form)
        made: Tensor = call.backend.normalize(given)
        return made

    recipes.add(y, make, input, weight, bias, residual)
    return y


def note_operator(result: tuple[Tensor, ...], *arguments: Any) -> None:
    """Note how y, which the operator of our layers has returned for these, is made again."""
    recipes, (y, mean, inverse_std, *_) = _recipes.get(), result
    if recipes is None or not y.requires_grad:
        return
    form = form_of(*arguments[7:])

    def make(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        given = Given(x, mean, inverse_std, weight, bias, residual, mask, form)
        return choose(x, form, residual).normalize(given)

    recipes.add(y, make, *arguments[:5])


def note_elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return function(*tensors), and note how that is made again, if one of them is, too."""
    result = function(*tensors)
    recipes = _recipes.get()
    if recipes is None or not result.requires_grad or not any(map(recipes.of, tensors)):
        return result
    if len(tensors) > 1 or result.dtype == tensors[0].dtype:  # or else autocast has made it so
        recipes.add(result, function, *tensors)
    return result
