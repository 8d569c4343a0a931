"""The commands that hold data against what a model was trained on: shift, adapt."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from torch import Tensor

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
from batchnorm.cli.data import SPELLINGS, read_inputs, shifted
from batchnorm.cli.ending import end
from batchnorm.models.files import (
    FileError,
    Model,
    NotVerified,
    check_paths,
    naming,
    read,
    whole,
    write,
)
from batchnorm.study.shifts import SHIFTS

if TYPE_CHECKING:
    from batchnorm.diagnose.shift import ShiftReport

_Data = Annotated[str, typer.Argument(metavar="DATA", help=SPELLINGS)]
_Shift = Annotated[
    str | None,
    typer.Option(
        "--shift",
        metavar="NAME:SEVERITY",
        help=f"Shift pictures first: {', '.join(SHIFTS)}, from 1 to 5, as blur:3.",
    ),
]
_MaxBatches = Annotated[int | None, typer.Option(min=1, help="How many calls at most.")]
_TrainBatchSize = Annotated[
    int, typer.Option(min=1, help="Examples in a batch of the training run.")
]
#: How many channels, those that moved most, are in the JSON.
_CHANNELS = 100


class _FailOn(StrEnum):
    shift = "shift"


def shift(
    model: Source,
    data: _Data,
    shift: _Shift = None,
    batch_size: BatchSize = None,
    max_batches: _MaxBatches = None,
    train_batch_size: _TrainBatchSize = 32,
    html: Annotated[
        Path | None, typer.Option(help="A page with table, picture, and what to do.")
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="All numbers; - for the standard output."),
    ] = None,
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

        to_stdout = json_file == "-"
        pages = {"--html": html, "--json": Path(json_file) if json_file and not to_stdout else None}
        for option, path in pages.items():
            if path is not None:
                _check_path(option, path)
        source, values, size, unused = _read(model, data, shift, batch_size, held_out=True)
        with naming(model, RUNS):
            report = shift_of_model(
                source,
                values,
                size,
                max_batches=max_batches,
                train_batch_size=train_batch_size,
            )
        Console(stderr=to_stdout).print(tables.shifted(report, unused))
        if json_file is not None:
            found = json.dumps(_plain(report), indent=2, allow_nan=False)
            if to_stdout:
                print(found)
            else:
                _save("--json", Path(json_file), found + "\n")
        if html is not None:
            from batchnorm.cli.shift_page import page

            with working("drawing"):
                content = page(report, model, data if shift is None else f"{data}, {shift}")
            _save("--html", html, content)
        for path in pages.values():
            if path is not None and not to_stdout:
                say_written(path)
        if fail_on is not None and report.shifted:
            end(f"{model}: the data have shifted, and --fail-on says so", 1)


def adapt(
    model: Source,
    data: _Data,
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
    max_batches: _MaxBatches = None,
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
        source, values, size, unused = _read(model, data, shift, batch_size)
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


def _read(
    model: Path, data: str, shift: str | None, batch_size: int | None, *, held_out: bool = False
) -> tuple[Model, tuple[Tensor, ...], int, int]:
    """Return a model, data, how many examples go into a call, and how many are left at the end."""
    from batchnorm.models.programs.running import inputs_of

    with working("reading"):
        source = read(model)
    with naming(model, RUNS):
        inputs = inputs_of(source)
        size = inputs.chosen_batch_size(batch_size)
    values = read_inputs(data, inputs, held_out=held_out)
    if shift is not None:
        values = shifted(shift, values)
    unused = len(values[0]) % size if inputs.batch_size is not None else 0
    return source, values, size, unused


def _check_path(option: str, path: Path) -> None:
    """Raise unless a file can be written there, before what takes its time is done."""
    where = f"{option} {path}"
    if not path.parent.is_dir():
        raise FileError(f"{path.parent} is no folder; make it, or name another one", where)
    if path.is_dir():
        raise FileError("is a folder; name a file in it", where)


def _save(option: str, path: Path, content: str) -> None:
    """Write a file whole, or not at all."""
    try:
        with whole(path) as partial:
            partial.write_text(content, encoding="utf-8")
    except OSError as error:
        raise FileError(f"{error.strerror}; name another file", f"{option} {path}") from error


def _plain(report: ShiftReport) -> Any:
    """Return a report as JSON has it: without numbers that are not finite."""
    found = report.to_dict()
    found["channels"] = found["channels"][:_CHANNELS]

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return plain(found)
