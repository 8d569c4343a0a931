"""Where the moments of several calls of a layer come together, before anything follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.functional import Plain, Tracked, is_recomputed
from batchnorm.moments import Moments


class Ledger:
    """The moments of all calls of a layer since it was opened, merged.

    A batch whose moments are not finite in `dtype`, and a recomputation of a checkpoint, add
    nothing. No value is read back from the device.

    Args:
        dtype: The type of what is to follow the moments.

    Attributes:
        total: The moments, or None if the layer did not run.
        batches: The number of batches among them.
    """

    total: Moments | None = None
    batches: Tensor | int = 0

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def add(self, found: Plain | Tracked) -> None:
        """Add what a call found."""
        again = is_recomputed(found)
        if again is True:
            return
        moments = found.moments().detach()
        good = moments.m2.isfinite().all()
        for followed in (moments.mean, moments.var(correction=1)):
            good = good & followed.to(self.dtype).isfinite().all()
        if again is not False:
            good = good & ~again
        count, mean, m2 = moments.count, moments.mean, moments.m2
        if not isinstance(count, Tensor):
            count = mean.new_full((), count)
        kept = Moments(*(torch.where(good, v, 0) for v in (count, mean, m2)))
        self.total = kept if self.total is None else self.total + kept
        self.batches = self.batches + (good & (count > 0)).to(torch.int64)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Make None of it: a copy of a layer is not part of what the layer is in."""
        return type(None), ()
