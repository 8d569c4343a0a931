"""The commands that hold data against what a model was trained on: shift, adapt."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

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
)
from batchnorm.cli.ending import end
from batchnorm.cli.looking import (
    STDOUT,
    Data,
    Html,
    Json,
    MaxBatches,
    check_pages,
    finite,
    read_both,
    save,
)
from batchnorm.models.files import Model, NotVerified, check_paths, naming, write
from batchnorm.study.shifts import SHIFTS

if TYPE_CHECKING:
    from batchnorm.diagnose.shift_report import ShiftReport

_Shift = Annotated[
    str | None,
    typer.Option(
        "--shift",
        metavar="NAME:SEVERITY",
        help=f"Shift pictures first: {', '.join(SHIFTS)}, from 1 to 5, as blur:3.",
    ),
]
_TrainBatchSize = Annotated[
    int, typer.Option(min=1, help="Examples in a batch of the training run.")
]
#: How many channels, those that moved most, are in the JSON.
_CHANNELS = 100


class _FailOn(StrEnum):
    shift = "shift"


def shift(
    model: Source,
    data: Data,
    shift: _Shift = None,
    batch_size: BatchSize = None,
    max_batches: MaxBatches = None,
    train_batch_size: _TrainBatchSize = 32,
    html: Html = None,
    json_file: Json = None,
    fail_on: Annotated[
        _FailOn | None, typer.Option(help="End with status 1 if there is a shift.")
    ] = None,
) -> None:
    """Tell whether data are what a model was trained on, by what its batch norms remember.

    Neither training data nor labels are needed. Of data with training and test inputs the latter
    are taken. The status is 0, or with --fail-on shift 1 if there is one; it is 2 where the input
    is bad. No code in a file is run.
    """
    with command(NOTHING):
        from batchnorm.cli import tables
        from batchnorm.diagnose.programs import shift_of_model

        check_pages(html, json_file, model, data)
        source, values, size, unused = read_both(
            model, data, batch_size, shift=shift, held_out=True
        )
        with naming(model, RUNS):
            report = shift_of_model(
                source,
                values,
                size,
                max_batches=max_batches,
                train_batch_size=train_batch_size,
            )
        Console(stderr=json_file == STDOUT).print(tables.shifted(report, unused))

        def drawn() -> str:
            from batchnorm.cli.shift_page import page

            return page(report, model, data if shift is None else f"{data}, {shift}")

        save(html, json_file, drawn, _plain(report))
        if fail_on is not None and report.shifted:
            end(f"{model}: the data have shifted, and --fail-on says so", 1)


def adapt(
    model: Source,
    data: Data,
    out: Out,
    shift: _Shift = None,
    prior: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How many examples what the model remembers counts for; by size and shift of the "
            "data if left out.",
        ),
    ] = None,
    batch_size: BatchSize = None,
    max_batches: MaxBatches = None,
    train_batch_size: _TrainBatchSize = 32,
) -> None:
    """Blend what batch norms remember with other data, to which the model adapts without labels.

    The statistics in the file are compared with the new ones before it gets its name: where they
    differ, the status is 1, and nothing is written. It is 2 where the input is bad. No code in a
    file is run.
    """
    with command(NOTHING):
        from batchnorm.cli import tables
        from batchnorm.diagnose.programs import adapt_model
        from batchnorm.models.programs.calibrating import same_statistics

        check_paths(model, out)
        source, values, size, unused = read_both(model, data, batch_size, shift=shift)
        with naming(model, RUNS):
            report = adapt_model(
                source,
                values,
                size,
                prior=prior,
                max_batches=max_batches,
                train_batch_size=train_batch_size,
            )

        def check(written: Model) -> None:
            Console().print(tables.adapted(report, unused))
            if not report.done:
                raise NotVerified(f"{model}: nothing could be adapted, and {NOTHING}")
            if not same_statistics(source, written):
                raise NotVerified(f"{out}: the file has other statistics: {NOTHING}")

        write(out, source, check)
        say_written(out)


def _plain(report: ShiftReport) -> Any:
    """Return a report as JSON has it."""
    found = report.to_dict()
    found["channels"] = found["channels"][:_CHANNELS]
    return finite(found)
