"""The command that says what is wrong with the batch norms of a model file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from batchnorm.cli.command import NOTHING, RUNS, BatchSize, Source, command
from batchnorm.cli.ending import end
from batchnorm.cli.looking import STDOUT, Data, Html, Json, MaxBatches, check_pages, read_both, save
from batchnorm.models.files import naming
from batchnorm.study.data import FORMS, load
from batchnorm.study.errors import printable


class _FailOn(StrEnum):
    warning = "warning"
    error = "error"


def check(
    model: Source,
    data: Data,
    batch_size: BatchSize = None,
    max_batches: MaxBatches = None,
    html: Html = None,
    json_file: Json = None,
    fail_on: Annotated[
        _FailOn | None, typer.Option(help="End with status 1 if there is such a finding, or worse.")
    ] = None,
) -> None:
    """Say what is wrong with the batch norms of a model, by data as it was trained on.

    What each gets is compared with its statistics, and what the model answers with what it would
    answer by the moments of each batch. The status is 0, or with --fail-on 1 if something was
    found; it is 2 where the input is bad. No code in a file is run.
    """
    with command(NOTHING):
        from batchnorm.cli import check_text
        from batchnorm.diagnose.check_programs import check_model

        check_pages(html, json_file, model, data)
        source, values, size, unused = read_both(model, data, batch_size)
        with naming(model, RUNS):
            report = check_model(
                source, values, size, labels=_labels(data), max_batches=max_batches
            )
        Console(stderr=json_file == STDOUT).print(check_text.checked(report, unused))

        def drawn() -> str:
            from batchnorm.cli.check_page import page

            return page(report, model, data)

        save(html, json_file, drawn, report.to_dict())
        bad = {"error", fail_on and fail_on.value}
        found = [finding for finding in report.findings if finding.severity in bad]
        if fail_on is not None and found:
            worst = found[0]
            place = f" at {worst.layer}" if worst.layer else ""
            end(printable(f"{model}: {worst.code}{place}, and --fail-on says so"), 1)


def _labels(data: str) -> Tensor | None:
    """Return the labels, of data that have some."""
    if data.partition(":")[0] not in {form.kind for form in FORMS}:
        return None
    return torch.from_numpy(load(data).train_labels)
