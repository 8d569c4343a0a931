"""The command line: verbs, exit statuses, progress; what they do is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

from batchnorm.environment import describe
from batchnorm.kernels import backends
from batchnorm.study.data import DataError
from batchnorm.study.tasks import StudyError


def _end(message: object, status: int) -> NoReturn:
    print(f"batchnorm: {message}", file=sys.stderr)
    sys.exit(status)


def _end_for_want_of(error: ModuleNotFoundError) -> NoReturn:
    _end(f'{error.name} is not installed: pip install "batchnorm[study]"', 2)


try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    _end_for_want_of(error)

app = typer.Typer(
    help="Batch normalization for PyTorch: the evidence of what it does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def study(
    data: Annotated[
        str, typer.Option(help="digits, mnist:DIR, cifar10:DIR or npz:FILE.")
    ] = "digits",
    quick: Annotated[bool, typer.Option("--quick", help="A first impression, in seconds.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default one on each core.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of outcomes and report.")] = Path("study"),
) -> None:
    """Train networks with and without batch normalization, and see what it does.

    Killed and started again, a study goes on where it was.
    """
    with _ended_in_one_line():
        from batchnorm.study.conduct import conduct

        conduct(data, out, console=Console(), quick=quick, jobs=jobs)


@app.command()
def env() -> None:
    """Show the versions, the hardware, and the kernels that can serve here."""
    for name, value in describe().items():
        print(f"{name:<10} {value}")
    for backend in backends():
        reason = backend.available()
        print(f"{'kernels':<10} {backend.name}: {'ready' if reason is None else reason}")


@contextmanager
def _ended_in_one_line() -> Iterator[None]:
    try:
        yield
    except (DataError, StudyError, OSError) as error:
        _end(error, 2)
    except ModuleNotFoundError as error:
        _end_for_want_of(error)
    except KeyboardInterrupt:
        _end("stopped; what is finished is kept: run the same command again to go on", 130)


def main() -> None:
    """Run the command line."""
    app()
