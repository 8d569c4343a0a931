"""The commands for model files: fold, calibrate, memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from batchnorm.cli.data import SPELLINGS, read_inputs
from batchnorm.cli.ending import ended_in_one_line
from batchnorm.models.files import (
    FileError,
    Model,
    NotVerified,
    check_paths,
    kind,
    naming,
    read,
    write,
)

_NOTHING = "nothing is written"
_RUNS = "the model cannot be run here; check that it was exported for the CPU"

_Source = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A .pt2 file of torch.export.save, or an .onnx file."),
]
_Out = Annotated[
    Path, typer.Option("--out", "-o", help="The new file, of the same kind; written whole, or not.")
]
_BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Examples in a call, where the model takes any number.")
]


def fold(
    model: _Source,
    out: _Out,
    data: Annotated[
        str | None,
        typer.Option(help=f"What the two are compared on; random values if left out. {SPELLINGS}"),
    ] = None,
    batch_size: _BatchSize = None,
    tol: Annotated[
        float | None,
        typer.Option(min=0, help="The largest error, relative to the largest value of an output."),
    ] = None,
) -> None:
    """Fold batch norms into the convolutions and linear layers beside them, for inference.

    The folded model is written if it gives the same outputs: else the status is 1, and nothing is
    written. It is 2 where the input is bad. No code in a file is run.
    """
    with _command(_NOTHING):
        import batchnorm as bn
        from batchnorm.cli import tables
        from batchnorm.models.compare import largest_error
        from batchnorm.models.programs.running import inputs_of, outputs_of

        check_paths(model, out)
        with _working("reading"):
            source = read(model)
        with naming(model, _RUNS):
            inputs = inputs_of(source)
            values = inputs.drawn(batch_size)
        if data is not None:
            size = inputs.chosen_batch_size(batch_size)
            values = tuple(value[:size] for value in read_inputs(data, inputs))
        with naming(model, _RUNS), _working("folding"):
            args, keywords = inputs.arguments(values)
            try:
                folded, report = bn.fold(source, args, keywords=keywords, tol=tol)
            except ValueError as error:  # which says what is wrong with the model
                raise FileError(str(error)) from error
            if not report.folded and not report.left:
                raise FileError("it has no batch norm; they were folded when it was exported")
            refused = list(report.left)
            if refused:  # whatever the graph does not allow
                _, possible = bn.fold(source, args, keywords=keywords, verify=False)
                refused = [name for name in refused if name not in possible.left]
            expected = outputs_of(source, values)

        def check(written: Model) -> None:
            with naming(out, _RUNS), _working("comparing"):
                error = largest_error(expected, outputs_of(written, values))
            Console().print(tables.folded(report, error))
            if refused:
                raise NotVerified(
                    f"{model}: with {refused[0]!r} folded the error is over {report.tol:.1e}, the "
                    f"largest allowed: {_NOTHING}; --tol allows more"
                )
            if not report.folded:
                raise NotVerified(f"{model}: nothing could be folded, and {_NOTHING}")
            if report.tol is not None and error > report.tol:
                raise NotVerified(
                    f"{out}: its largest error is {error:.1e}, over {report.tol:.1e}: {_NOTHING}"
                )

        write(out, folded, check, source=source)
        _say_written(out)


def calibrate(
    model: _Source,
    data: Annotated[str, typer.Argument(metavar="DATA", help=SPELLINGS)],
    out: _Out,
    batch_size: _BatchSize = None,
    max_batches: Annotated[int | None, typer.Option(min=1, help="How many calls at most.")] = None,
) -> None:
    """Set the running statistics of batch norms to the exact moments of data.

    Each layer is normalized by the moments of its batch, as in training, and those of all batches
    merge exactly. The statistics in the file are compared with the new ones before it gets its
    name: where they differ, the status is 1, and nothing is written. It is 2 where the input is
    bad. No code in a file is run.
    """
    with _command(_NOTHING):
        from batchnorm.cli import tables
        from batchnorm.models.programs.calibrating import calibrate_model, same_statistics
        from batchnorm.models.programs.running import inputs_of

        check_paths(model, out)
        with _working("reading"):
            source = read(model)
        with naming(model, _RUNS):
            inputs = inputs_of(source)
            size = inputs.chosen_batch_size(batch_size)
        values = read_inputs(data, inputs)
        with naming(model, _RUNS):
            report = calibrate_model(source, values, size, max_batches)

        def check(written: Model) -> None:
            Console().print(tables.calibrated(report))
            if not report.done:
                raise NotVerified(f"{model}: nothing could be calibrated, and {_NOTHING}")
            if not same_statistics(source, written):
                raise NotVerified(f"{out}: the file has other statistics: {_NOTHING}")

        write(out, source, check)
        _say_written(out)


def memory(model: _Source, batch_size: _BatchSize = None) -> None:
    """Show what a training step would keep for its backward pass, and what would save some.

    Of a .pt2 file; an ONNX file has no backward pass. No code in the file is run.
    """
    with _command("nothing is kept"):
        import batchnorm as bn
        from batchnorm.models.programs.running import inputs_of
        from batchnorm.models.programs.training import training_module

        if kind(model) != ".pt2":
            raise FileError(
                "an ONNX file has no backward pass: give a .pt2 file of torch.export.save", model
            )
        with _working("reading"):
            source = read(model)
        with naming(model, _RUNS), _working("measuring"):
            inputs = inputs_of(source)
            args, keywords = inputs.arguments(inputs.drawn(batch_size))
            report = bn.memory_report(training_module(source), args, keywords=keywords)
        print(report)


@contextmanager
def _command(kept: str) -> Iterator[None]:
    """End what goes wrong in one line, and leave out what torch warns itself of.

    Args:
        kept: What Ctrl-C leaves.
    """
    with ended_in_one_line("export", kept), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def _working(what: str) -> Iterator[None]:
    """Show on a terminal what is at work."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def _say_written(out: Path) -> None:
    Console().print(f"Written: {out}", markup=False, soft_wrap=True, highlight=False)
