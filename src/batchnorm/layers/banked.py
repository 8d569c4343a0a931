"""Banked batch normalization: statistics of their own for each of several distributions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional import in_backward
from batchnorm.functional.surroundings import is_transformed
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.recent import Recent

#: The name of a bank, or the index of one per example.
Domain = str | Tensor

_domain: ContextVar[Domain | None] = ContextVar("batchnorm_domain", default=None)
#: The same for a compiler, which knows no context.
_latest: Domain | None = None


@contextmanager
def domain(which: Domain) -> Iterator[None]:
    """Choose the bank of every `BankedBatchNorm` that is called inside.

    Args:
        which: The name of a bank; or, for a mixed batch, the index of one per example, (N,).

    Raises:
        TypeError: It is neither.

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.BankedBatchNorm(3, banks=("real", "fake"))
        >>> with bn.domain("fake"):
        ...     y = layer(torch.randn(8, 3))
        >>> layer["real"].num_batches_tracked, layer["fake"].num_batches_tracked
        (tensor(0), tensor(1))
    """
    if not isinstance(which, str | Tensor):
        raise TypeError(
            f"domain is a {type(which).__name__}: expected the name of a bank, or a tensor with "
            "the index of one per example"
        )
    global _latest
    token, outer = _domain.set(which), _latest
    _latest = which
    try:
        yield
    finally:
        _domain.reset(token)
        _latest = outer


class BankedBatchNorm(nn.Module):
    """Batch normalization of several distributions, each with a layer of its own: its bank.

    Real and generated images, clean and adversarial ones, the domains of a data set: normalized
    together, each is measured against a mixture that is neither. Each bank is a layer with its own
    moments, running statistics and affine part. Which one normalizes is said by the call, or by
    `with domain(...)` around it; where neither says so it is the first. An index per example sends
    each example of a mixed batch to its own bank.

    Args:
        num_features: Number of channels, C.
        args: As of `BatchNorm`.
        banks: Their names, the default first.
        layer: The class of the banks.
        share_affine: Whether all banks have the weight and bias of the first.
        settings: As of that class.

    Shape:
        - input, residual, output, mask: those of `BatchNorm`

    Raises:
        ValueError: There are no banks, two of one name, or a setting cannot be.

    Example:
        >>> import batchnorm as bn, torch
        >>> layer = bn.BankedBatchNorm(3, banks=("clean", "adversarial"))
        >>> y = layer(torch.randn(8, 3), domain="adversarial")
        >>> y = layer(torch.randn(8, 3), domain=torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]))

    Source:
        Xie et al., Adversarial examples improve image recognition, 2020 (arXiv:1911.09665); Chang
        et al., Domain-specific batch normalization, 2019 (arXiv:1906.03950).
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        banks: Sequence[str],
        layer: type[BatchNorm] = BatchNorm,
        share_affine: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._fill({name: layer(num_features, *args, **settings) for name in _names(banks)})
        if share_affine:
            self._share_affine()

    @classmethod
    def from_layer(
        cls, layer: BatchNorm, banks: Sequence[str], *, share_affine: bool = False
    ) -> BankedBatchNorm:
        """Return a layer whose banks begin as copies of a trained one, whatever its class.

        Args:
            layer: The trained layer; it becomes the first bank itself.
            banks: Their names, the default first.
            share_affine: Whether all banks have the weight and bias of the first.

        Raises:
            ValueError: There are no banks, or two of one name.
            TypeError: The layer is none of this package.

        Example:
            >>> import batchnorm as bn
            >>> trained = bn.GhostBatchNorm(3, ghost_size=8)
            >>> bn.BankedBatchNorm.from_layer(trained, ("photo", "sketch")).names
            ('photo', 'sketch')
        """
        if not isinstance(layer, BatchNorm):
            raise TypeError(
                f"layer is a {type(layer).__module__}.{type(layer).__name__}: expected a layer of "
                "batchnorm; one of torch.nn gives it its numbers, by load_state_dict(state_dict())"
            )
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        first, *others = _names(banks)
        new._fill({first: layer, **{name: copy.deepcopy(layer) for name in others}})
        if share_affine:
            new._share_affine()
        return new.train(layer.training)

    def _fill(self, layers: dict[str, BatchNorm]) -> None:
        self.banks = nn.ModuleDict(layers)
        self.names = tuple(layers)
        self._recent: Recent[Domain] = Recent()

    def _share_affine(self) -> None:
        first = self[self.names[0]]
        for name in self.names[1:]:
            self[name].weight, self[name].bias = first.weight, first.bias

    def __getitem__(self, name: str) -> BatchNorm:
        """Return the bank of that name."""
        return self.banks[name]  # type: ignore[return-value]

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        domain: Domain | None = None,
    ) -> Tensor:
        """Return the normalized batch.

        Args:
            input: The batch.
            residual: Added before the activation; the shape of `input`.
            mask: The positions that are there; see `batch_norm`.
            domain: The name of a bank, or the index of one per example, (N,).

        Raises:
            ValueError: There is no such bank, or an index is of another shape; or as of the bank.
            TypeError: As of the bank.
            RuntimeError: A checkpoint recomputes a call in `with domain(...)` that was too long
                ago; or as of the bank.

        Example:
            >>> import batchnorm as bn, torch
            >>> layer = bn.BankedBatchNorm(3, banks=("a", "b"))
            >>> layer(torch.randn(4, 3), domain="b").shape
            torch.Size([4, 3])
        """
        which = self._which(input) if domain is None else domain
        if isinstance(which, str):
            if which not in self.names:
                raise ValueError(f"domain is {which!r}: expected one of {', '.join(self.names)}")
            output: Tensor = self.banks[which](input, residual, mask)
            return output
        return self._mixed(input, residual, mask, which)

    def _which(self, x: Tensor) -> Domain:
        """Return the domain around a call, or, of a recomputation, that around the call it repeats.

        A backward pass may run outside of it, or inside another, or in a thread without any.
        """
        first = self.names[0]
        if torch.compiler.is_compiling():
            return first if _latest is None else _latest
        if not in_backward():
            around = _domain.get()
            which = first if around is None else around
            if (around is not None or self._recent) and not is_transformed():
                self._recent.add(_some(x), which)
            return which
        if not self._recent:
            return first  # no call was in a domain
        again = self._recent.find(_some(x))
        if again is None:
            raise RuntimeError(
                "a checkpoint recomputes a call that is not among the last "
                f"{Recent.size}, so the domain that was around it is not known: run the backward "
                "pass sooner after its forward pass, or give the layer its domain as an argument"
            )
        return again

    def _mixed(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, index: Tensor
    ) -> Tensor:
        """Send each example to its own bank, and put the results back in order."""
        channel_dim = self[self.names[0]].channel_dim
        dim = 1 if channel_dim % x.ndim == 0 else 0  # the examples'
        examples = x.shape[dim]
        if index.shape != (examples,) or index.is_floating_point():
            raise ValueError(
                f"domain is of size {tuple(index.shape)} and {index.dtype}: expected the index of "
                f"a bank for each of the {examples} examples, 0 to {len(self.names) - 1}"
            )
        index = index.to(x.device, torch.int64)
        if not torch.compiler.is_compiling() and bool(
            ((index < 0) | (index >= len(self.names))).any()
        ):
            raise ValueError(
                f"domain has indices from {int(index.min())} to {int(index.max())}: expected 0 to "
                f"{len(self.names) - 1}, for {', '.join(self.names)}"
            )
        if mask is not None:
            mask = _over_positions(mask, x, channel_dim)
        parts, places = [], []
        examples_of = {
            name: (index == at).nonzero().squeeze(1) for at, name in enumerate(self.names)
        }
        names = list(self.names)
        if all(self[name].process_group is None for name in names):
            # what may be too few for a variance comes first: if that is an error, nothing has moved
            names.sort(key=lambda name: examples_of[name].shape[0])
        for name in names:
            rows, bank = examples_of[name], self[name]
            if rows.shape[0] == 0 and bank.process_group is None:
                continue
            chosen = (
                None if v is None else v.index_select(d, rows)
                for v, d in ((x, dim), (residual, dim), (mask, 0))
            )
            parts.append(bank(*chosen))
            places.append(rows)
        if not parts:  # an empty batch
            parts, places = [self[self.names[0]](x, residual, mask)], [index]
        y = torch.cat(parts, dim).index_select(dim, torch.cat(places).argsort())
        return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _names(banks: Sequence[str]) -> tuple[str, ...]:
    names = (banks,) if isinstance(banks, str) else tuple(banks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"banks is {banks!r}: expected at least one name, and each only once")
    return names


def _some(x: Tensor) -> Tensor:
    """Return a few values of all over a batch, which tell it from others."""
    return x[tuple(slice(None, None, max(1, size // 3)) for size in x.shape)]


def _over_positions(mask: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Return a mask in the shape of the positions, the examples first."""
    if mask.ndim == x.ndim:
        mask = mask.select(channel_dim, 0)
    positions = list(x.shape)
    del positions[channel_dim]
    return mask.expand(positions)
