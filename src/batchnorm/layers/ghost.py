"""Ghost batch normalization: parts of a batch, each normalized on its own."""

from __future__ import annotations

from typing import Any

from batchnorm.layers.batch_norm import BatchNorm


class GhostBatchNorm(BatchNorm):
    """Batch normalization of groups of consecutive examples, as if each were a batch.

    So the noise that small batches add, which regularizes, is kept where large ones are trained.
    Every `ghost_size` examples are normalized by their own moments; the last group has the rest,
    and a rest of one value a channel joins the group before it. The running statistics follow the
    moments of the whole batch, which are those of the groups merged, and evaluation is that of
    `BatchNorm`.

    Args:
        num_features: Number of channels, C.
        args: As of `BatchNorm`.
        ghost_size: Number of examples in a group.
        settings: As of `BatchNorm`.

    Shape:
        - input, residual, output, mask: those of `BatchNorm`

    Raises:
        ValueError: A setting cannot be.

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.GhostBatchNorm(3, ghost_size=4)
        >>> x = torch.randn(10, 3, 5, 5)  # groups of 4, 4 and 2
        >>> torch.allclose(layer(x)[4:8], bn.BatchNorm(3)(x[4:8]), atol=1e-6)
        True

    Source:
        Hoffer, Hubara & Soudry, Train longer, generalize better, 2017 (arXiv:1705.08741).
    """

    def __init__(
        self, num_features: int, *args: Any, ghost_size: int = 32, **settings: Any
    ) -> None:
        super().__init__(num_features, *args, ghost_size=ghost_size, **settings)
