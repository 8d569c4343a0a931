"""What a model does in one call, as it runs: which step reads what which other step made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(eq=False)
class Step:
    """A call of a function of torch that made a tensor.

    Attributes:
        what: The name of the function; empty for a batch norm.
        source: What made its first tensor, if that was seen.
        shape: The sizes of what it made.
        bias: The third tensor that it was called with, or the one called so.
        p: The probability that it was called with.
        readers: What reads it: a step, a batch norm by name, or None for the model's output.
    """

    what: str
    source: Step | None
    shape: tuple[int, ...] = ()
    bias: Tensor | None = None
    p: float = 0.0
    readers: list[Step | str | None] = field(default_factory=list)


class Tape(TorchFunctionMode):
    """Notes what is called inside; batch norms are one step each. It keeps no activation alive.

    Attributes:
        steps: In their order.
        before: For each batch norm, what made the input of each of its calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.before: dict[str, list[Step | None]] = {}
        self._made: Any = (
            WeakTensorKeyDictionary()
        )  # a tensor that is gone may leave its id to another
        self._inside = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function, and note it."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if not self._inside:
            made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            if made:
                name, _, _ = getattr(func, "__name__", "").partition(".")  # of `dropout.default`
                self._note(name, args, kwargs, made)
        return result

    def _note(
        self, what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: list[Tensor]
    ) -> None:
        first = args[0] if args else kwargs.get("input")
        step = Step(what, self._step(first), tuple(made[0].shape))
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
        if isinstance(bias, Tensor) and bias.ndim == 1:
            step.bias = bias
        p = kwargs.get("p", args[1] if len(args) > 1 else 0)
        if isinstance(p, float | int):
            step.p = float(p)
        self.read((args, kwargs), step)
        for tensor in made:
            self._made[tensor] = step
        self.steps.append(step)

    def _step(self, value: Any) -> Step | None:
        found: Step | None = self._made.get(value) if isinstance(value, Tensor) else None
        return found

    def read(self, values: Any, reader: Step | str | None) -> None:
        """Note what reads some values."""
        steps = (self._step(leaf) for leaf in pytree.tree_leaves(values))
        for step in dict.fromkeys(step for step in steps if step is not None):
            step.readers.append(reader)

    def enter(self, name: str, x: Tensor) -> None:
        """Begin with a batch norm."""
        if not self._inside:
            self.before.setdefault(name, []).append(self._step(x))
            self.read(x, name)
        self._inside += 1

    def leave(self) -> None:
        """End with it; what it made was made by no step that is known."""
        self._inside -= 1
