"""Which backend serves a call: the one place that decides it (`plain` asks here, too).

A backend that was asked for by name must serve, or the call fails and says why; left to itself the
choice falls through to the next backend, and says so once in the log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from torch import Tensor

from batchnorm.kernels import native, triton
from batchnorm.kernels.contract import Backend, Form
from batchnorm.kernels.eager import Eager
from batchnorm.kernels.native import Native
from batchnorm.kernels.triton import Triton

VARIABLE = "BATCHNORM_BACKEND"

#: The four steps as differentiable operations, whatever backend serves the calls.
DIFFERENTIABLE = Eager()

_EAGER = Eager(in_place=True)
#: The kernels in C++.
NATIVE = Native()
_TRITON = Triton()
#: The preferred one first.
_BACKENDS: dict[str, Backend] = {b.name: b for b in (NATIVE, _TRITON, _EAGER)}
_forced: ContextVar[str | None] = ContextVar("batchnorm_backend", default=None)
_log = logging.getLogger("batchnorm")


def backends() -> tuple[Backend, ...]:
    """Return the backends, the preferred one first.

    Each has a `name`, and `available()`, which returns None or the reason why it cannot run here.

    Example:
        >>> [backend.name for backend in backends()]
        ['native', 'triton', 'eager']
    """
    return tuple(_BACKENDS.values())


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend of every call inside.

    A backward pass runs on the backend of its forward pass, wherever it is called; in compiled code
    each chooses when it runs. What `torch.func` and forward mode look into is always made of
    PyTorch operations. The environment variable `BATCHNORM_BACKEND`, read once, does the same for a
    whole process; this goes before it. A call that the backend cannot serve raises RuntimeError
    with the reason.

    Args:
        name: The name of one of `backends()`.

    Raises:
        ValueError: There is no such backend.

    Example:
        >>> import batchnorm as bn, torch
        >>> with bn.backend("eager"):
        ...     y = bn.BatchNorm1d(3)(torch.randn(8, 3))
    """
    _named(name, "backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(x: Tensor, form: Form, residual: Tensor | None = None) -> Backend:
    """Return the backend for a batch: the forced one, or the first that can take it.

    Raises:
        RuntimeError: The forced backend cannot take it.
        ValueError: The environment variable names no backend.
    """
    name = _forced.get() or _from_environment()
    if name:
        forced = _named(name, VARIABLE)
        if reason := _refusal(forced, x, form, residual):
            raise RuntimeError(
                f"batchnorm: backend {name!r} was asked for and cannot serve this call: {reason}. "
                f"Leave {VARIABLE} and bn.backend(...) away to let the package choose."
            )
        return forced
    for candidate in _BACKENDS.values():
        if (reason := _refusal(candidate, x, form, residual)) is None:
            return candidate
        _say_once(candidate.name, reason)
    return _EAGER


def is_served_by_native() -> bool:
    """Return whether `choose` tries the backend `native` first."""
    return (_forced.get() or _from_environment() or next(iter(_BACKENDS))) == NATIVE.name


def are_there(x: Tensor) -> bool:
    """Return whether there are kernels for tensors like this, whatever their strides.

    Unlike `choose`, a compiler can trace it.
    """
    return native.takes(x) or triton.takes(x)


def _refusal(backend: Backend, x: Tensor, form: Form, residual: Tensor | None) -> str | None:
    """Return why a backend cannot serve, or None if it can."""
    if residual is not None and residual.dtype is not x.dtype and backend is not _EAGER:
        return f"the residual is of {residual.dtype} and the input of {x.dtype}"
    return backend.available() or backend.supports(x, form)


@cache  # to ask anew would take as long as the rest of the choice
def _from_environment() -> str | None:
    return os.environ.get(VARIABLE)


def _named(name: str, where: str) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(f"{where} is {name!r}: expected one of {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


@cache
def _say_once(name: str, reason: str) -> None:
    _log.info("backend %r does not serve here: %s", name, reason)
