"""Batch renormalization: training that sees what evaluation will."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.functional import Renorm, State, in_backward, operators
from batchnorm.functional.surroundings import is_compiling, is_transformed
from batchnorm.kernels.steps import Correction
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.recent import Recent


class BatchRenorm(BatchNorm):
    """Batch normalization whose training corrects xhat towards the running statistics.

        xhat = (x - mean) / std * r + d
        r = clip(std / running_std, 1 / r_max, r_max)
        d = clip((mean - running_mean) / running_std, -d_max, d_max)

    r and d are constants to the gradient. Within the limits xhat is what evaluation would give, so
    small or unlike batches train a network that evaluates as it was trained. With r_max = 1 and
    d_max = 0 it is `BatchNorm`, and so it begins: the limits stay there for `warmup_batches`, until
    the running statistics mean something, and then grow evenly. The number of batches so far is
    the buffer `num_batches_tracked`, so a training that is resumed goes on where it was.

    Args:
        num_features: Number of channels, C.
        args: As of `BatchNorm`.
        r_max: The largest r, at least 1.
        d_max: The largest d, at least 0.
        warmup_batches: For so many batches it is plain batch normalization.
        r_batches: After so many batches, counted from the first, the limit of r is `r_max`.
        d_batches: Likewise, that of d is `d_max`.
        settings: As of `BatchNorm`.

    Shape:
        - input, residual, output, mask: those of `BatchNorm`

    Raises:
        ValueError: A setting cannot be.

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.BatchRenorm(3, warmup_batches=0, r_batches=0, d_batches=0)
        >>> layer.limits()
        (tensor(3.), tensor(5.))
        >>> layer(torch.randn(4, 3)).shape
        torch.Size([4, 3])

    Source:
        Ioffe, Batch Renormalization, 2017 (arXiv:1702.03275), algorithm 1; the schedule is that of
        section 4.
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_batches: int = 5_000,
        r_batches: int = 40_000,
        d_batches: int = 25_000,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, *args, **settings)
        if not self.track_running_stats:
            raise ValueError(
                "BatchRenorm corrects towards running statistics: it needs track_running_stats=True"
            )
        if not r_max >= 1 or not d_max >= 0:
            raise ValueError(f"r_max is {r_max} and d_max {d_max}: expected r_max >= 1, d_max >= 0")
        if not 0 <= warmup_batches <= min(r_batches, d_batches):
            raise ValueError(
                f"warmup_batches is {warmup_batches}, r_batches {r_batches}, d_batches {d_batches}:"
                " expected 0 <= warmup_batches, and neither of the others below it"
            )
        self.r_max, self.d_max = r_max, d_max
        self.warmup_batches, self.r_batches, self.d_batches = warmup_batches, r_batches, d_batches
        self._recent: Recent[Correction] = Recent()

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return r_max and d_max as the schedule has them now, scalars on the layer's device.

        Example:
            >>> import batchnorm as bn
            >>> bn.BatchRenorm(3).limits()
            (tensor(1.), tensor(0.))
        """
        batches = self.num_batches_tracked
        assert batches is not None  # a layer without is refused

        def grown(end: int) -> Tensor:
            if end == self.warmup_batches:
                return (batches >= end).to(torch.float32)
            return ((batches - self.warmup_batches) / (end - self.warmup_batches)).clamp(0, 1)

        return 1 + grown(self.r_batches) * (self.r_max - 1), grown(self.d_batches) * self.d_max

    def extra_repr(self) -> str:
        """Return what `BatchNorm` says, and the limits."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"

    def _corrects(self, state: State | None) -> Corrected | None:
        if state is None or self.statistics != "mode":  # the batch's own were asked for
            return None
        renorm = Renorm(state.running_mean, state.running_var, *self.limits(), self.eps)
        return Corrected(renorm, self._recent)


class Corrected:
    """The correction of one call; that of a recomputation is the one of the call it repeats.

    By then the running statistics have moved. What a checkpoint recomputes has the same moments as
    before, so these say which call it was.

    Args:
        renorm: What corrects.
        recent: The corrections of recent calls, by their means.
    """

    def __init__(self, renorm: Renorm, recent: Recent[Correction]) -> None:
        self._renorm, self._recent = renorm, recent

    def correction(self, mean: Tensor, inverse_std: Tensor) -> Correction:
        """Return the correction of a batch with that mean and 1 / std."""
        traced = torch.compiler.is_compiling() or is_transformed()
        if traced or not in_backward():
            found = self._renorm.correction(mean, inverse_std)
            if is_compiling() and not is_transformed():
                found = found._replace(r=torch.ops.batchnorm.not_again.default(found.r))
            elif not traced:
                self._recent.add(mean, found)
            return found
        again = self._recent.find(mean)
        if again is None:
            raise RuntimeError(
                "a checkpoint recomputes a call of BatchRenorm that is not among the last "
                f"{Recent.size}, and the running statistics that it was corrected by are gone: run "
                "the backward pass sooner after its forward pass"
            )
        return again


def _run_not_again(r: Tensor) -> Tensor:
    if in_backward():
        raise RuntimeError(
            "a checkpoint recomputes BatchRenorm in compiled code, and the running statistics that "
            "it was corrected by have moved: leave the layer out of the checkpoint, or do not "
            "compile it"
        )
    return r.clone()


operators.define("not_again", "(Tensor r) -> Tensor", _run_not_again, torch.empty_like)
