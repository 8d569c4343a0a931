"""How a command ends: exit statuses, and one line for what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from batchnorm.bench.errors import BenchError, WrongResult
from batchnorm.models.files import FileError, NotVerified
from batchnorm.study.data import DataError
from batchnorm.study.tasks import StudyError

#: The part of the package that has what may be missing, where the verb does not tell.
_EXTRAS = {
    "dask": "dask",
    "distributed": "dask",
    "onnx": "export",
    "onnxruntime": "export",
    "ray": "ray",
    "tensorboard": "tensorboard",
}


def end(message: object, status: int) -> NoReturn:
    """Say one line, and end with a status."""
    print(f"batchnorm: {message}", file=sys.stderr)
    sys.exit(status)


def end_for_want_of(error: ModuleNotFoundError, extra: str = "study") -> NoReturn:
    """Say what is not installed, and how to install it."""
    extra = _EXTRAS.get((error.name or "").partition(".")[0], extra)
    end(f'{error.name} is not installed: pip install "batchnorm[{extra}]"', 2)


@contextmanager
def ended_in_one_line(extra: str, kept: str) -> Iterator[None]:
    """End what goes wrong in one line.

    Args:
        extra: The part of the package that has what may be missing.
        kept: What Ctrl-C leaves.
    """
    try:
        yield
    except (BenchError, DataError, FileError, StudyError, OSError) as error:
        end(error, 2)
    except (NotVerified, WrongResult) as error:
        end(error, 1)
    except ModuleNotFoundError as error:
        end_for_want_of(error, extra)
    except KeyboardInterrupt:
        end(f"stopped; {kept}", 130)
