"""What the parts of a big batch have together, for one layer."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import in_backward, update_running
from batchnorm.moments import Moments


class Parts:
    """The parts of a big batch, for one layer: what each had in the last pass, by call.

    A layer may be called several times with a part; each call of one part is pooled with that of
    the others.

    Args:
        is_updating: Whether the running statistics will follow.

    Attributes:
        all_moments: The moments of all parts, by call, as of the pass before.
        all_sums: The two sums of the backward pass, likewise.
    """

    def __init__(self, is_updating: bool) -> None:
        self.is_updating, self.is_settled = is_updating, False
        self.all_moments: dict[int, Moments] = {}
        self.all_sums: dict[int, tuple[Tensor, Tensor]] = {}
        self.moments: dict[int, dict[int, Moments]] = defaultdict(dict)  # by call, by part
        self.sums: dict[int, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
        self.of_part: list[Moments] = []  # by call, those of the part that comes now
        self._part = self._call = 0

    def begin(self, part: int, is_settled: bool) -> None:
        """Say which part comes next, and whether the moments are settled."""
        self._part, self._call, self.is_settled = part, 0, is_settled
        self.of_part = []

    def __call__(self) -> Others:
        """Return what the next call of the layer is pooled with."""
        if in_backward():  # a checkpoint is recomputed, and its moments say which call it was
            return Others(self, self._part, None)
        call, self._call = self._call, self._call + 1
        return Others(self, self._part, call)

    def settle_moments(self) -> bool:
        """Merge what the parts had in this pass, and return whether that changed anything."""
        before = self.all_moments
        self.all_moments = {call: Moments.sum(own.values()) for call, own in self.moments.items()}
        return not _same(
            {call: (m.mean, m.m2) for call, m in before.items()},
            {call: (m.mean, m.m2) for call, m in self.all_moments.items()},
        )

    def settle_sums(self) -> bool:
        """Add up what the parts had in this pass, and return whether that changed anything."""
        before = self.all_sums
        self.all_sums = {}
        for call, own in self.sums.items():
            first, second = (
                torch.stack(values).sum(0) for values in zip(*own.values(), strict=True)
            )
            self.all_sums[call] = first, second
        return not _same(before, self.all_sums)

    def lead(self, layer: _BatchNorm) -> None:
        """Let the running statistics of the layer follow each call, if they follow at all."""
        mean, var = layer.running_mean, layer.running_var
        if mean is None or var is None or not self.is_updating:
            return
        for _, moments in sorted(self.all_moments.items()):
            update_running(mean, var, moments, layer.momentum, layer.num_batches_tracked)


class Others:
    """What one call is pooled with: the same call of all parts, as of the pass before.

    Args:
        parts: Of the layer.
        part: Which part it is a call with.
        call: Which call of that part it is; None if only its moments will say so.
    """

    def __init__(self, parts: Parts, part: int, call: int | None) -> None:
        self._parts, self._part, self._call = parts, part, call

    def moments(self, own: Moments) -> Moments:
        """Return the moments of all parts, as far as they are known."""
        parts = self._parts
        if self._call is None:
            self._call = _nearest(own, parts.of_part)
        else:
            parts.of_part.append(own)
            if not parts.is_settled:
                parts.moments[self._call][self._part] = own
        return parts.all_moments.get(self._call, own)

    def sums(self, sum_g: Tensor, sum_g_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two sums over all parts, as far as they are known.

        Raises:
            RuntimeError: They are to be differentiated, through parts that are gone.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a big batch has no gradient of a gradient: its parts are gone through one by one"
            )
        assert self._call is not None  # `moments` came first
        own = sum_g, sum_g_xhat
        self._parts.sums[self._call][self._part] = own
        return self._parts.all_sums.get(self._call, own)


def _nearest(own: Moments, known: list[Moments]) -> int:
    if len(known) == 1:
        return 0
    return int(torch.stack([(own.mean - m.mean).square().sum() for m in known]).argmin())


def _same(
    before: dict[int, tuple[Tensor, Tensor]], after: dict[int, tuple[Tensor, Tensor]]
) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(a, b) for call in after for a, b in zip(before[call], after[call], strict=True)
    )
