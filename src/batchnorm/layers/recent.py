"""What a layer remembers of its recent calls, for a checkpoint that computes one of them again."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Recent(Generic[T]):
    """What recent calls went by, to be found by a sign of their input; a copy of it is empty.

    Attributes:
        size: How many calls are remembered.
    """

    size = 32

    def __init__(self) -> None:
        self._calls: deque[tuple[Tensor, T]] = deque(maxlen=self.size)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, sign: Tensor, value: T) -> None:
        """Remember what a call goes by.

        Args:
            sign: Some numbers of its input, which a recomputation has again.
            value: What it goes by.
        """
        self._calls.append((sign.detach().clone(), value))

    def find(self, sign: Tensor) -> T | None:
        """Return what a call with that sign went by, or None if it is not remembered.

        Of several it is the last that was not found yet, as a backward pass comes by them.

        Args:
            sign: As it was for `add`.
        """
        for at in reversed(range(len(self._calls))):
            known, value = self._calls[at]
            if _like(known) == _like(sign) and torch.allclose(known, sign, 0, 0, equal_nan=True):
                del self._calls[at]
                self._calls.appendleft((known, value))
                return value
        return None

    def __reduce__(self) -> Any:
        """Leave everything out: it is about graphs that no copy is part of."""
        return Recent, ()


def _like(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
