"""Moments over several processes: one collective each way, and what it says when it fails.

The collectives are operators of torch, so that autograd goes through them any number of times and
a compiler keeps them whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.functional.operators import define
from batchnorm.functional.surroundings import is_transformed
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: One of the operators, or what stands for it in transforms: takes a tensor and a group's name.
Collective = Callable[[Tensor, str], Tensor]


class Synchronized:
    """The processes of a group: all their batches are normalized by the same moments.

    Forward, each process gives one row of count, mean and m2, and gets the rows of all, which it
    merges in the order of ranks: so all get the same bits. Backward, the two sums are added up.
    All of it is float64, counts too.

    Args:
        group: The process group.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def moments(self, own: Moments) -> Moments:
        """Return the moments over all processes."""
        mean, count = own.mean, own.count
        if not isinstance(count, Tensor):
            count = torch.full((), count, dtype=mean.dtype, device=mean.device)
        row = torch.cat([count.to(mean.dtype).reshape(1), mean, own.m2])
        rows = self.gather(row)
        channels = mean.shape[0]
        return Moments(rows[:, :1], *torch.split(rows[:, 1:], channels, 1)).merged()

    def gather(self, row: Tensor) -> Tensor:
        """Return the rows of all processes, (P, ...), in the order of their ranks."""
        gather: Collective = torch.ops.batchnorm.gather.default
        if is_transformed():
            gather = _Gather.apply
        return gather(row, self.group.group_name)

    def sums(self, sum_g: Tensor, sum_g_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two sums over all processes."""
        both = torch.cat([sum_g, sum_g_xhat])
        all_sum: Collective = torch.ops.batchnorm.all_sum.default
        if is_transformed():
            all_sum = _AllSum.apply
        first, second = all_sum(both, self.group.group_name).chunk(2)
        return first, second


def synchronized(processes: ProcessGroup | Literal["world"] | None) -> Synchronized | None:
    """Return the other processes to normalize with, or None if there are none.

    Args:
        processes: A process group; `"world"` for the default one; or None.

    Raises:
        TypeError: It is neither.
    """
    if processes is None or not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if processes == "world" else processes
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is {processes!r}: expected a process group, which this process is "
            'part of, "world" or None'
        )
    return None if group.size() == 1 else Synchronized(group)


def agree(
    pool: Synchronized, number: int, device: torch.device, of: str = "layers of unequal channels"
) -> None:
    """Raise RuntimeError on every process unless all of them have the same number of something.

    It is one collective and reads its result, so it is for the first call of a layer: after that,
    collectives of unequal sizes would hang, or fail with words that help nobody.
    """
    found = pool.gather(torch.tensor([number], device=device)).flatten().tolist()
    if len(set(found)) > 1:
        ranks = dist.get_process_group_ranks(pool.group)
        each = ", ".join(f"rank {r} has {size}" for r, size in zip(ranks, found, strict=True))
        raise RuntimeError(
            f"the processes of this group synchronize {of}: {each}. Build "
            "the same model on every process, and call its layers in the same order"
        )


def _resolved(name: str) -> ProcessGroup:
    group: ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
    return group


def _explain(error: Exception, group: ProcessGroup, doing: str) -> NoReturn:
    raise RuntimeError(
        f"batch normalization over {group.size()} processes failed on rank {dist.get_rank()}, "
        f"while it {doing}: another process died, failed, or did not get to this layer within the "
        f"group's timeout. Look at what the other ranks say first. ({error})"
    ) from error


def _run_gather(row: Tensor, name: str) -> Tensor:
    group = _resolved(name)
    rows = row.new_zeros(group.size(), *row.shape)
    try:
        if row.is_cuda and dist.get_backend(group) == "gloo":  # which gathers on the CPU alone
            rows[group.rank()] = row
            dist.all_reduce(rows, group=group)
        else:
            name = "all_gather_single"  # called all_gather_into_tensor before torch 2.13
            gather = getattr(dist, name, None) or dist.all_gather_into_tensor
            gather(rows.view(-1), row.contiguous(), group=group)  # gloo knows no stacks
    except RuntimeError as error:
        _explain(error, group, "gathered the moments")
    return rows


def _run_all_sum(values: Tensor, name: str) -> Tensor:
    group, total = _resolved(name), values.clone(memory_format=torch.contiguous_format)
    try:
        dist.all_reduce(total, group=group)
    except RuntimeError as error:
        _explain(error, group, "added up the gradients")
    return total


def _fake_gather(row: Tensor, name: str) -> Tensor:
    return row.new_empty(_resolved(name).size(), *row.shape)


def _fake_all_sum(values: Tensor, name: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.group = inputs[1]


def _differentiate_gather(ctx: Any, rows: Tensor) -> tuple[Tensor, None]:
    total = torch.ops.batchnorm.all_sum.default(rows, ctx.group)
    return total[_resolved(ctx.group).rank()], None


def _differentiate_all_sum(ctx: Any, values: Tensor) -> tuple[Tensor, None]:
    return torch.ops.batchnorm.all_sum.default(values, ctx.group), None


define(
    "gather", "(Tensor row, str group) -> Tensor", _run_gather, _fake_gather,
    _differentiate_gather, _remember,
)  # fmt: skip
define(
    "all_sum", "(Tensor values, str group) -> Tensor", _run_all_sum, _fake_all_sum,
    _differentiate_all_sum, _remember,
)  # fmt: skip


class _Gather(torch.autograd.Function):
    """The operator as transforms of `torch.func` take it, which differentiate no operators."""

    @staticmethod
    def forward(row: Tensor, group: str) -> Tensor:
        rows: Tensor = torch.ops.batchnorm.gather.default(row, group)
        return rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor, None]:
        total = _AllSum.apply(rows, ctx.group)  # type: ignore[no-untyped-call]
        return total[_resolved(ctx.group).rank()], None


class _AllSum(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(values: Tensor, group: str) -> Tensor:
        total: Tensor = torch.ops.batchnorm.all_sum.default(values, group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, values: Tensor) -> tuple[Tensor, None]:
        return _AllSum.apply(values, ctx.group), None  # type: ignore[no-untyped-call]
