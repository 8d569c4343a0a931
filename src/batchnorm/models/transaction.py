"""Transactions: several forward passes that count as one batch, or not at all."""

from __future__ import annotations

from types import TracebackType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import update_running
from batchnorm.functional.checks import check_momentum
from batchnorm.layers import BatchNorm, Ledger
from batchnorm.models.adopt import adopt, check_adoptable, let_go
from batchnorm.models.walk import Where, batch_norms
from batchnorm.moments import Moments


class Transaction:
    """The forward passes inside count as one: see `transaction`."""

    def __init__(self, model: nn.Module, where: Where = None) -> None:
        if where is not None and not isinstance(where, str) and not callable(where):
            where = tuple(where)  # it is asked for more than once
        batch_norms(model, where)  # so that an error is raised here
        self._model, self._where = model, where
        self._layers: dict[str, BatchNorm] = {}

    def __enter__(self) -> Transaction:
        chosen = batch_norms(self._model, self._where)
        for name, layer in chosen.items():
            if isinstance(layer, BatchNorm) and layer.ledger is not None:
                raise RuntimeError(
                    f"{name!r} is in a transaction already: commit or roll back that one first"
                )
        check_adoptable(chosen)
        for name, layer in chosen.items():
            follows = layer._is_updating() if isinstance(layer, BatchNorm) else layer.training
            if follows and layer.running_mean is not None:
                _check_counted(name, layer)
        for name, layer in chosen.items():
            self._layers[name] = adopt(name, layer, "transaction")
            self._layers[name].ledger = _ledger(self._layers[name])
        return self

    def commit(self) -> None:
        """Let the running statistics follow all forward passes since the last decision, as one.

        Those of all layers, or, if there is an error, of none. A layer that was frozen meanwhile
        stays where it is.

        Raises:
            ValueError: A layer averages over all batches, and nobody counts them.
        """
        following: list[tuple[BatchNorm, Moments]] = []
        for name, layer in self._layers.items():
            total = None if layer.ledger is None else layer.ledger.total
            if total is not None and layer.update != "never":
                _check_counted(name, layer)
                following.append((layer, total))
        for layer, total in following:
            mean, var = layer.running_mean, layer.running_var
            assert mean is not None  # or else nothing would follow
            assert var is not None
            update_running(mean, var, total, layer.momentum, layer.num_batches_tracked)
        self.rollback()  # of what has been committed nothing is left to decide

    def rollback(self) -> None:
        """Forget all forward passes since the last decision: every buffer is as it was."""
        for layer in self._layers.values():
            layer.ledger = _ledger(layer)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self._close()

    def _close(self) -> None:
        for layer in self._layers.values():
            layer.__dict__.pop("ledger", None)
            let_go(layer, "transaction")
        self._layers = {}


def _ledger(layer: BatchNorm) -> Ledger:
    """Return a new ledger, of what the running statistics can take."""
    return Ledger() if layer.running_var is None else Ledger(layer.running_var.dtype)


def _check_counted(name: str, layer: _BatchNorm) -> None:
    """Raise ValueError if the layer averages over all batches, and nobody counts them."""
    try:
        check_momentum(layer.momentum, layer.num_batches_tracked)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot follow: {error}") from error


def transaction(model: nn.Module, *, where: Where = None) -> Transaction:
    """Let all forward passes inside a `with` count as one batch, or as none.

    Inside, no running statistic moves. The moments of all forward passes in training pool, exactly
    and in any order, and at `commit()` the running statistics follow them in ONE update, as they
    would have followed one batch of all. `rollback()` forgets them: every buffer is, bit for bit,
    what it was. Either can be called several times, for what came since. What is not decided at
    the end is committed, and rolled back if an error leaves the block.

    What pools are the moments: each forward pass is still normalized by those of its own batch, so
    gradient accumulation in a transaction is not a step on one big batch; `big_batch` is.

    Args:
        model: The model.
        where: Which layers; see `freeze`.

    Returns:
        What goes into a `with`, and has `commit()` and `rollback()`.

    Raises:
        ValueError: `where` names no layer; or, raised at `with` and at `commit()`, before any layer
            moves, a layer averages over all batches, and nobody counts them.
        RuntimeError: A layer is in a transaction already; raised at `with`.
        TypeError: A layer is of a class of which nobody knows what its forward does; likewise.

    Example:
        >>> import batchnorm as bn, torch
        >>> model, x = bn.BatchNorm(3), torch.randn(32, 3)
        >>> with bn.transaction(model) as t:
        ...     for micro_batch in x.split(8):
        ...         y = model(micro_batch)
        ...     t.commit()
        >>> whole = bn.BatchNorm(3)
        >>> _ = whole(x)
        >>> torch.allclose(model.running_var, whole.running_var), model.num_batches_tracked
        (True, tensor(1))
    """
    return Transaction(model, where)
