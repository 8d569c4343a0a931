"""Synchronized batch normalization: one batch that lies on several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from batchnorm.layers.batch_norm import BatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SyncBatchNorm(BatchNorm):
    """Batch normalization by the moments over all processes of a group.

    In training the processes exchange count, mean and m2 of each channel, in one collective, and
    merge them exactly; in the backward pass they add up two numbers a channel, in another. So y
    and the gradients are those of one process with the whole batch, whatever the shares are: a
    process may have more examples than another, or none. In evaluation, in a world of one, and
    where `torch.distributed` was not initialized, it is `BatchNorm`.

    It works with any backend of `torch.distributed`, on the CPU (gloo) and the GPU (NCCL), and
    waits for no value of the device. At a layer's first call the processes make sure that they
    have as many channels.

    Args:
        num_features: Number of channels, C.
        args: As of `BatchNorm`.
        process_group: The processes; the default group if left out.
        settings: As of `BatchNorm`.

    Shape:
        - input, residual, output, mask: those of `BatchNorm`

    Raises:
        ValueError: A setting cannot be.

    Example:
        >>> import batchnorm as bn, torch
        >>> bn.SyncBatchNorm(3)(torch.randn(8, 3, 5, 5)).shape
        torch.Size([8, 3, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        process_group: ProcessGroup | Literal["world"] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, *args, process_group=process_group or "world", **settings)
