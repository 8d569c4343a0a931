"""What is wrong with a user's data, said in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class DataError(ValueError):
    """Something is wrong with a user's data.

    Args:
        message: What was got, from which file, what was expected, and the way out. It becomes one
            printable line, whatever file names and the errors of other libraries bring into it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


def wrong(
    where: object, got: str, expected: str, way_out: str = "get or make the file again"
) -> DataError:
    """Return the error that says this of a place, for the caller to raise."""
    return DataError(f"{where}: got {got}, expected {expected}; {way_out}")


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `DataError` that names the place."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a parser that is fed damaged bytes may raise anything
        reason = str(error) or type(error).__name__
        raise wrong(where, f"the error '{reason}'", "a whole, readable file") from error


@contextlib.contextmanager
def needing(where: object, package: str) -> Iterator[None]:
    """Say how to install a package of the study's if an import inside fails."""
    try:
        yield
    except ImportError as error:
        way_out = 'pip install "batchnorm[study]", or name other data'
        raise wrong(where, str(error), package, way_out) from error


def printable(text: str) -> str:
    r"""Return a text in which nothing can steer a terminal.

    Example:
        >>> print(printable("a\x1b[2J"))
        a\x1b[2J
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
