"""The layers: `torch.nn.BatchNorm1d/2d/3d` with more to them, and one for any rank."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from batchnorm.functional import (
    OnSmallBatch,
    State,
    agree,
    check_ghost_size,
    check_on_small_batch,
    follow,
    refuse_recomputation,
    run,
    synchronized,
)
from batchnorm.half_life import half_life_of, momentum_from_half_life
from batchnorm.kernels import Activation, ActivationLike
from batchnorm.kernels.steps import Corrects, Pool
from batchnorm.layers.ledger import Ledger
from batchnorm.layers.naming import name_layer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HALF_TYPES = (torch.float16, torch.bfloat16)

#: Which moments normalize.
Normalizing = Literal["mode", "batch", "running"]
#: When the running statistics follow.
Updating = Literal["training", "grad", "always", "never"]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization of a batch of any rank.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training, the moments of every channel over the batch normalize it, and the running ones
    follow: running = (1 - momentum) * running + momentum * batch, the variance by m / (m - 1). In
    evaluation the running ones normalize, so that one example alone can be predicted.

    A batch that is empty or not finite, and a recomputation under `torch.utils.checkpoint`, leave
    the running statistics as they are; they are float32 or wider, also after `.half()`.

    Args:
        num_features: Number of channels, C.
        eps: Added to the variance, in its unit.
        momentum: How much a batch counts in the running statistics; None averages over all batches.
        affine: Whether there are learned `weight` (gamma, from 1) and `bias` (beta, from 0).
        track_running_stats: Whether there are running statistics. Without them the batch's own
            moments normalize in evaluation, too.
        device: Where the parameters and buffers are made.
        dtype: Their type.
        bias: Whether an affine layer has a `bias`.
        channel_dim: The channels' dimension.
        activation: `"relu"`, `"leaky_relu"`, `"elu"`, `"silu"`, `"gelu"`, `"sigmoid"`, `"tanh"`,
            `"relu6"`, `"hardswish"`, or a pair with the slope or alpha, as `("leaky_relu", 0.2)`;
            part of the same call.
        correction: The variance that normalizes is divided by m - correction.
        on_small_batch: In training, one value per channel has no variance: raise an `"error"`,
            normalize by the `"running"` statistics, or `"skip"` the batch (xhat is 0). The last
            two update nothing.
        inplace: Whether the output is written over the input, where no gradient is recorded.
        ghost_size: In training, so many consecutive examples are normalized on their own; see
            `GhostBatchNorm`.
        process_group: In training, the moments are those over all processes of this group, or of
            the default one, `"world"`; see `SyncBatchNorm`.
        statistics: Which moments normalize: the `"batch"`'s, the `"running"` ones, or, by
            `"mode"`, the batch's in training and the running ones in evaluation.
        update: When the running statistics follow: in `"training"`; in training, but not under
            `torch.no_grad`, with `"grad"` (nor, then, under a checkpoint with `use_reentrant=True`,
            whose forward pass is under `torch.no_grad`, too); `"always"`; or `"never"`. The third
            setting, whether the affine part is trained, is `requires_grad` of `weight` and `bias`.
        half_life_batches: In place of `momentum`: after so many batches, half of what the running
            statistics were is forgotten; momentum = 1 - 2^(-1 / half_life_batches).

    Shape:
        - input: any, with C channels along `channel_dim`
        - residual: that of the input
        - mask: any that broadcasts over the positions, the input's shape without its channels
        - output: that of the input

    Raises:
        ValueError: A setting cannot be.
        TypeError: `dtype` is complex.

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.BatchNorm(3, activation="relu")
        >>> layer(torch.randn(8, 3, 5, 5, 5)).shape
        torch.Size([8, 3, 5, 5, 5])
        >>> sequences = torch.randn(4, 10, 3)  # examples, steps, channels
        >>> lengths = torch.tensor([10, 4, 7, 1])
        >>> y = bn.BatchNorm(3, channel_dim=-1)(sequences, mask=torch.arange(10) < lengths[:, None])

    Source:
        Ioffe & Szegedy, Batch Normalization, 2015 (arXiv:1502.03167).
    """

    # What a layer of torch.nn has when it is made one of these, by its class alone.
    channel_dim: int = 1
    activation: str | tuple[str, float] | None = None
    correction: float = 0
    on_small_batch: OnSmallBatch = "error"
    inplace: bool = False
    ghost_size: int | None = None
    process_group: ProcessGroup | Literal["world"] | None = None
    statistics: Normalizing = "mode"
    update: Updating = "training"

    #: Where a tool collects the moments that the running statistics would follow.
    ledger: Ledger | None = None
    #: What a tool lets a batch be normalized together with, in place of other processes.
    pooled: Callable[[], Pool] | None = None
    _agreed = False

    #: The ranks that `forward` takes; None for all.
    ranks: tuple[int, ...] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channel_dim: int = 1,
        activation: ActivationLike = None,
        correction: float = 0,
        on_small_batch: OnSmallBatch = "error",
        inplace: bool = False,
        ghost_size: int | None = None,
        process_group: ProcessGroup | Literal["world"] | None = None,
        statistics: Normalizing = "mode",
        update: Updating = "training",
        half_life_batches: float | None = None,
    ) -> None:
        if half_life_batches is not None:
            if momentum != 0.1:
                raise ValueError(
                    f"momentum is {momentum} and half_life_batches {half_life_batches}: they say "
                    "the same thing, so give one of them"
                )
            momentum = momentum_from_half_life(half_life_batches)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        if dtype is not None and dtype.is_complex:
            raise TypeError(f"dtype is {dtype}: expected a real floating-point type")
        check_on_small_batch(on_small_batch)
        if on_small_batch == "running" and not track_running_stats:
            raise ValueError("on_small_batch='running' needs track_running_stats=True")
        if ghost_size is not None:
            check_ghost_size(ghost_size)
        _check_choice("statistics", statistics, get_args(Normalizing))
        _check_choice("update", update, get_args(Updating))
        if statistics == "running" and not track_running_stats:
            raise ValueError("statistics='running' needs track_running_stats=True")
        self._widen_statistics()
        parsed = Activation.parse(activation)
        self.channel_dim = channel_dim
        self.activation = None if parsed is None else parsed.spec
        self.correction = correction
        self.on_small_batch = on_small_batch
        self.inplace = inplace
        self.ghost_size = ghost_size
        self.process_group = process_group
        self.statistics = statistics
        self.update = update

    @property
    def half_life_batches(self) -> float | None:
        """After how many batches half of the running statistics is forgotten; None if never.

        (1 - momentum)^h = 1/2; with momentum=None, an average over all batches, none is forgotten.

        Returns:
            The half-life h, in batches.

        Raises:
            ValueError: `momentum` is no number between 0 and 1.

        Example:
            >>> import batchnorm as bn
            >>> bn.BatchNorm(3, half_life_batches=10).half_life_batches
            10.0
        """
        return None if self.momentum is None else half_life_of(self.momentum)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the normalized batch.

        Args:
            input: The batch, with its channels along `channel_dim`.
            residual: Added before the activation; the shape of `input`.
            mask: The positions that are there, boolean or weights >= 0, of a shape that broadcasts
                over the positions; see `batch_norm`.

        Raises:
            ValueError: A shape cannot be, or the batch has one value per channel in training.
            RuntimeError: A per-channel tensor has the wrong size, a tensor is on another device,
                `inplace` cannot be, another process failed, or a checkpoint recomputes a layer
                that normalizes by running statistics which it has moved.
            TypeError: `input` is complex or of an integer type.

        Example:
            >>> import batchnorm as bn, torch
            >>> x = torch.randn(8, 3)
            >>> bn.BatchNorm1d(3, activation="relu")(x, residual=x, mask=torch.arange(8) < 6).shape
            torch.Size([8, 3])
        """
        if torch.compiler.is_compiling():  # which cannot look at the stack to name the layer
            return self._normalize(input, residual, mask)
        try:
            return self._normalize(input, residual, mask)
        except (ValueError, TypeError, RuntimeError) as error:
            name = name_layer
            if "torch._dynamo" in sys.modules:  # it may be about to compile that call, too
                name = torch.compiler.disable(name_layer)  # type: ignore[no-untyped-call]
            name(error, self)
            raise

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        # to ask the module for each takes ten times as long; what is parametrized is not in there
        buffers, parameters = self._buffers, self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean = buffers["running_mean"]
        if mean is not None and mean.dtype in _HALF_TYPES:  # by what casts buffers by itself
            self._widen_statistics()
        mean, var = buffers["running_mean"], buffers["running_var"]
        state = None
        if mean is not None and var is not None:
            state = State(mean, var, buffers["num_batches_tracked"])
        by_batch = self.statistics == "batch" or (
            self.statistics == "mode" and (self.training or state is None)
        )
        track = state is not None and self.track_running_stats and self._is_updating()
        if track and not by_batch:
            refuse_recomputation("the layer normalizes by running statistics that it updates")
        pool = corrects = None
        if by_batch or track:
            if self.process_group is not None or self.pooled is not None:
                pool = self._pool(input.device)
            corrects = self._corrects(state)
        y, found = run(
            input, state, weight, bias, residual, mask, by_batch, track, self.channel_dim,
            self.eps, self.correction, self.activation, self.ghost_size, self.on_small_batch,
            self.inplace, pool, corrects,
        )  # fmt: skip
        if found is not None and state is not None:
            if self.ledger is None:
                follow(found, state, self.momentum)
            else:
                self.ledger.add(found)
        return y

    def _is_updating(self) -> bool:
        """Return whether the running statistics follow now."""
        update = self.update
        if update == "training":
            return self.training
        if update == "grad":
            return self.training and torch.is_grad_enabled()
        return update == "always"

    def _pool(self, device: torch.device) -> Pool | None:
        """Return what else to normalize with: other processes, if there are any."""
        if self.pooled is not None:
            return self.pooled()
        if self.process_group is None or not self.training:
            return None
        pool = synchronized(self.process_group)
        if pool is not None and not self._agreed and not torch.compiler.is_compiling():
            agree(pool, self.num_features, device)
            self._agreed = True
        return pool

    def _corrects(self, state: State | None) -> Corrects | None:
        """Return what corrects the moments of a batch: see `BatchRenorm`."""
        return None

    def _check_input_dim(self, input: Tensor) -> None:
        if self.ranks is not None and input.dim() not in self.ranks:
            expected = " or ".join(f"{rank}D" for rank in self.ranks)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")

    def extra_repr(self) -> str:
        """Return what `torch.nn` says of the layer, and what differs from the defaults."""
        ours = {
            "channel_dim": 1,
            "activation": None,
            "correction": 0,
            "on_small_batch": "error",
            "inplace": False,
            "ghost_size": None,
            "process_group": None,
            "statistics": "mode",
            "update": "training",
        }
        given = {name: getattr(self, name) for name in ours}
        if hasattr(self.process_group, "size"):
            given["process_group"] = f"{self.process_group.size()} processes"  # type: ignore[union-attr]
        changed = [f"{name}={given[name]!r}" for name in ours if given[name] != ours[name]]
        return ", ".join([super().extra_repr(), *changed])  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        before = self._running()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, after in self._running().items():
            if after.dtype in _HALF_TYPES:  # statistics would not survive that
                exact = after if before[name].is_meta else before[name]
                self._buffers[name] = exact.to(after.device, _wide(exact.dtype))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes sure of the other processes again, as one that they have made anew does
        return {name: value for name, value in self.__dict__.items() if name != "_agreed"}

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNorm:
        new = self.__new__(type(self))
        memo[id(self)] = new
        if not isinstance(self.process_group, str | None):  # which stays the same one
            memo[id(self.process_group)] = self.process_group
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._widen_statistics()  # load_state_dict(..., assign=True) takes whatever type it finds

    def _widen_statistics(self) -> None:
        for name, statistic in self._running().items():
            self._buffers[name] = statistic.to(_wide(statistic.dtype))

    def _running(self) -> dict[str, Tensor]:
        names = ("running_mean", "running_var")
        return {name: b for name in names if (b := self._buffers.get(name)) is not None}


def _check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{name} is {choice!r}: expected one of {', '.join(map(repr, choices))}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF_TYPES else dtype


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): `torch.nn.BatchNorm1d`, and more.

    The arguments, the state dict and the errors are those of `torch.nn.BatchNorm1d`, the formula
    and what is new, by keyword only, are those of `BatchNorm`.

    Shape:
        - input, residual, output: (N, C) or (N, C, L)
        - mask: what broadcasts over (N,) or (N, L)

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.BatchNorm1d(100, activation="sigmoid")
        >>> layer(torch.randn(60, 100)).shape
        torch.Size([60, 100])
    """

    ranks = (2, 3)


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Batch normalization of images, (N, C, H, W): `torch.nn.BatchNorm2d`, and more.

    A channel has one mean and one variance, over the examples and all pixels. The arguments, the
    state dict and the errors are those of `torch.nn.BatchNorm2d`, the formula and what is new, by
    keyword only, are those of `BatchNorm`. What is channels last stays so.

    Shape:
        - input, residual, output: (N, C, H, W)
        - mask: what broadcasts over (N, H, W)

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.BatchNorm2d(16, activation="relu")
        >>> x = torch.randn(8, 16, 28, 28)
        >>> layer(x, residual=x).shape
        torch.Size([8, 16, 28, 28])
    """

    ranks = (4,)


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Batch normalization of volumes, (N, C, D, H, W): `torch.nn.BatchNorm3d`, and more.

    The arguments, the state dict and the errors are those of `torch.nn.BatchNorm3d`, the formula
    and what is new, by keyword only, are those of `BatchNorm`.

    Shape:
        - input, residual, output: (N, C, D, H, W)
        - mask: what broadcasts over (N, D, H, W)

    Example:
        >>> import batchnorm as bn, torch
        >>> bn.BatchNorm3d(4)(torch.randn(2, 4, 5, 6, 7)).shape
        torch.Size([2, 4, 5, 6, 7])
    """

    ranks = (5,)
