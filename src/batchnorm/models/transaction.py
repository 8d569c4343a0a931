"""Transactions: several forward passes that count as one batch, or not at all."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from batchnorm.functional import update_running
from batchnorm.layers import BatchNorm, Ledger
from batchnorm.models.adopt import adopt, check_adoptable, let_go
from batchnorm.models.walk import Where, batch_norms


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
            self._layers[name] = adopt(name, layer, "transaction")
            self._layers[name].ledger = Ledger()
        return self

    def commit(self) -> None:
        """Let the running statistics follow all forward passes since the last decision, as one.

        Raises:
            ValueError: A layer averages over all batches, and nobody counts them.
        """
        for layer in self._layers.values():
            ledger, mean, var = layer.ledger, layer.running_mean, layer.running_var
            if ledger is not None and ledger.total is not None:
                assert mean is not None  # or else nothing would follow
                assert var is not None
                update_running(mean, var, ledger.total, layer.momentum, layer.num_batches_tracked)
            layer.ledger = Ledger()

    def rollback(self) -> None:
        """Forget all forward passes since the last decision: every buffer is as it was."""
        for layer in self._layers.values():
            layer.ledger = Ledger()

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
        ValueError: `where` names no layer.
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
