"""What tools do with data: any iterable of batches, and how a model is called with one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: How to call a model with a batch.
CallModel = Callable[[nn.Module, Any], Any]


def call_with(model: nn.Module, batch: Any, call: CallModel | None) -> Any:
    """Call a model with a batch, moved to where the model is.

    Args:
        model: The model.
        batch: A tensor; a tuple or list, whose first element is the input; or a mapping, passed as
            keywords. What is in it and has a method `to` is moved.
        call: Calls the model with the batch in another way, if given.

    Raises:
        TypeError: The batch is none of these, and `call` was not given.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    if device is not None:

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return value.to(device) if hasattr(value, "to") else value

        # packed sequences and what tokenizers return move themselves
        batch = pytree.tree_map(moved, batch, is_leaf=lambda value: hasattr(value, "to"))
    if call is not None:
        return call(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"a batch is a {type(batch).__name__}: expected a tensor, a tuple or list whose first "
        "element is the input, or a dict of keywords; or say how to call the model, "
        "call=lambda model, batch: model(...)"
    )


def limited(data: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """Return the batches of the data, so many at most; a tensor is one batch."""
    batches = (data,) if isinstance(data, Tensor) else data
    return islice(iter(batches), max_batches)


@contextmanager
def progress_bar(
    description: str, data: Iterable[Any], max_batches: int | None, passes: int, show: bool
) -> Iterator[Callable[[], None]]:
    """Show how far a tool is, where there is a terminal and Rich is installed.

    Args:
        description: What is done.
        data: The batches.
        max_batches: How many of them at most.
        passes: How often all of them are gone through.
        show: Whether to show anything.

    Yields:
        A function to call after each batch.
    """
    show = show and sys.stderr.isatty()
    if show:
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:
            show = False
    if not show:
        yield lambda: None
        return
    known = len(data) if isinstance(data, Sized) and not isinstance(data, Tensor) else None
    total = max_batches if known is None else min(known, max_batches or known)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(description, total=None if total is None else total * passes)
        yield lambda: bars.advance(bar)


_lock = Lock()
_stances: list[AbstractContextManager[Any]] = []


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let models that `torch.compile` made run as they were written, inside.

    What a tool sets on the layers changes from pass to pass, and each change would be compiled.
    That is said to torch once for all threads: the first that comes says it, and the last takes it
    back.
    """
    if "torch._dynamo" not in sys.modules:  # and nothing was compiled
        yield
        return
    with _lock:
        outermost = torch.compiler.set_stance("force_eager") if not _stances else nullcontext()
        _stances.append(outermost)
    try:
        yield
    finally:
        with _lock:
            if len(_stances) == 1:
                _stances[0].__exit__(None, None, None)
                _stances.clear()
            else:
                _stances.pop()


class Modes:
    """The modes of all modules of a model, to be given back.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._training = {module: module.training for module in model.modules()}

    def restore(self) -> None:
        """Set every module's mode to what it was."""
        for module, training in self._training.items():
            module.training = training


class Buffers:
    """The buffers of all modules of a model, to be given back.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Set every buffer to the tensor that it was, with the values that it had.

        One that did not change is not written to: a graph may keep it for its backward pass.
        """
        for module, name, buffer, values in self._saved:
            module._buffers[name] = buffer
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def rng_states() -> Any:
    """Return the states of torch's random numbers, on the CPU and the GPUs in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda


def set_rng_states(states: Any) -> None:
    """Set what `rng_states` returned."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
