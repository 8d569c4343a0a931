"""What can go wrong with a bench, said in one line."""

from __future__ import annotations


class BenchError(ValueError):
    """Something is wrong with what was asked for."""


class WrongResult(ArithmeticError):
    """A contender computes something else, so that its time would mean nothing."""
