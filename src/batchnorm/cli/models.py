"""The commands for model files: fold, calibrate, memory."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from batchnorm.cli.command import (
    NOTHING,
    RUNS,
    BatchSize,
    Out,
    Source,
    command,
    say_written,
    working,
)
from batchnorm.cli.data import SPELLINGS, read_inputs
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


def fold(
    model: Source,
    out: Out,
    data: Annotated[
        str | None,
        typer.Option(help=f"What the two are compared on; random values if left out. {SPELLINGS}"),
    ] = None,
    batch_size: BatchSize = None,
    tol: Annotated[
        float | None,
        typer.Option(min=0, help="The largest error, relative to the largest value of an output."),
    ] = None,
) -> None:
    """Fold batch norms into the convolutions and linear layers beside them, for inference.

    The folded model is written if it gives the same outputs: else the status is 1, and nothing is
    written. It is 2 where the input is bad. No code in a file is run.
    """
    with command(NOTHING):
        import batchnorm as bn
        from batchnorm.cli import tables
        from batchnorm.models.compare import largest_error
        from batchnorm.models.programs.running import inputs_of, outputs_of

        check_paths(model, out)
        with working("reading"):
            source = read(model)
        with naming(model, RUNS):
            inputs = inputs_of(source)
            values = inputs.drawn(batch_size)
        if data is not None:
            size = inputs.chosen_batch_size(batch_size)
            values = tuple(value[:size] for value in read_inputs(data, inputs))
        with naming(model, RUNS), working("folding"):
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
            with naming(out, RUNS), working("comparing"):
                error = largest_error(expected, outputs_of(written, values))
            Console().print(tables.folded(report, error))
            if refused:
                raise NotVerified(
                    f"{model}: with {refused[0]!r} folded the error is over {report.tol:.1e}, the "
                    f"largest allowed: {NOTHING}; --tol allows more"
                )
            if not report.folded:
                raise NotVerified(f"{model}: nothing could be folded, and {NOTHING}")
            if report.tol is not None and error > report.tol:
                raise NotVerified(
                    f"{out}: its largest error is {error:.1e}, over {report.tol:.1e}: {NOTHING}"
                )

        write(out, folded, check, source=source)
        say_written(out)


def calibrate(
    model: Source,
    data: Annotated[str, typer.Argument(metavar="DATA", help=SPELLINGS)],
    out: Out,
    batch_size: BatchSize = None,
    max_batches: Annotated[int | None, typer.Option(min=1, help="How many calls at most.")] = None,
) -> None:
    """Set the running statistics of batch norms to the exact moments of data.

    Each layer is normalized by the moments of its batch, as in training, and those of all batches
    merge exactly. The statistics in the file are compared with the new ones before it gets its
    name: where they differ, the status is 1, and nothing is written. It is 2 where the input is
    bad. No code in a file is run.
    """
    with command(NOTHING):
        from batchnorm.cli import tables
        from batchnorm.models.programs.calibrating import calibrate_model, same_statistics
        from batchnorm.models.programs.running import inputs_of

        check_paths(model, out)
        with working("reading"):
            source = read(model)
        with naming(model, RUNS):
            inputs = inputs_of(source)
            size = inputs.chosen_batch_size(batch_size)
        values = read_inputs(data, inputs)
        with naming(model, RUNS):
            report = calibrate_model(source, values, size, max_batches)

        def check(written: Model) -> None:
            Console().print(tables.calibrated(report))
            if not report.done:
                raise NotVerified(f"{model}: nothing could be calibrated, and {NOTHING}")
            if not same_statistics(source, written):
                raise NotVerified(f"{out}: the file has other statistics: {NOTHING}")

        write(out, source, check)
        say_written(out)


def memory(model: Source, batch_size: BatchSize = None) -> None:
    """Show what a training step would keep for its backward pass, and what would save some.

    Of a .pt2 file; an ONNX file has no backward pass. No code in the file is run.
    """
    with command("nothing is kept"):
        import batchnorm as bn
        from batchnorm.models.programs.running import inputs_of
        from batchnorm.models.programs.training import training_module

        if kind(model) != ".pt2":
            raise FileError(
                "an ONNX file has no backward pass: give a .pt2 file of torch.export.save", model
            )
        with working("reading"):
            source = read(model)
        with naming(model, RUNS), working("measuring"):
            inputs = inputs_of(source)
            args, keywords = inputs.arguments(inputs.drawn(batch_size))
            report = bn.memory_report(training_module(source), args, keywords=keywords)
        print(report)
