"""Where the steps of a training begin and end: heard from the model and from its optimizers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from batchnorm.functional import in_backward
from batchnorm.functional.surroundings import is_traced_or_transformed


class Steps:
    """Counts steps: from a forward pass in training to the next step of an optimizer of the model.

    Evaluation is no pass of a step, and neither is a recomputation, a trace or a transform. A pass
    that fails does not count.

    Args:
        model: The model as it is called.
        begin: Called before the first pass of a step; what it enters is left after the pass.
        passed: Called after that pass.
        end: Called after an optimizer's step, with the parameters that it has, by id; or with None
            for all.

    Attributes:
        done: How many steps are over.
        passes: How many passes the step that is not over has had.
    """

    def __init__(
        self,
        model: nn.Module,
        begin: Callable[[ExitStack], None],
        passed: Callable[[], None],
        end: Callable[[set[int] | None], None],
    ) -> None:
        self._model, self._begin, self._passed, self._end = model, begin, passed, end
        self.done = self.passes = 0
        self._counts = False  # whether the pass that runs is one of a step
        self._entered = ExitStack()
        self._hooks: list[Any] = []

    @property
    def is_attached(self) -> bool:
        """Whether anything is heard."""
        return bool(self._hooks)

    def attach(self) -> None:
        """Begin to listen; a step whose end was not heard is over."""
        self.done += self.passes > 0
        self.passes = 0
        self._hooks += [
            self._model.register_forward_pre_hook(_Tap(self._before)),
            self._model.register_forward_hook(_Tap(self._after)),
            register_optimizer_step_post_hook(self._look),  # of any that will be made, too
        ]

    def detach(self) -> None:
        """Stop listening, also in the middle of a pass that failed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._entered.close()

    def step(self, own: set[int] | None = None) -> None:
        """End the step, if one has begun.

        Args:
            own: The parameters that were updated, by id; None for all.
        """
        self._end(own)
        if self.passes > 0:
            self.passes = 0
            self.done += 1

    def _before(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._entered.close()  # of a pass that failed
        self._counts = self._is_training()
        if self._counts and self.passes == 0:
            self._begin(self._entered)

    def _after(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or not self._counts:
            return
        self._counts = False
        self._entered.close()
        self.passes += 1
        if self.passes == 1:
            self._passed()

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in own for p in self._model.parameters()):
            self.step(own)

    def _is_training(self) -> bool:
        if in_backward() or is_traced_or_transformed() or not torch.is_grad_enabled():
            return False
        model: Any = self._model  # a wrapper does not hear of .eval() on what is in it
        while True:
            if isinstance(model, DataParallel | DistributedDataParallel):
                model = model.module
            elif hasattr(model, "_orig_mod"):
                model = model._orig_mod
            else:
                return bool(model.training)


class _Tap:
    """Calls a monitor; copied or pickled with a model, it calls nothing.

    Args:
        call: What it calls.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __reduce__(self) -> tuple[type[_Tap], tuple[()]]:
        return _Tap, ()
