"""What the commands that hold data against a model have together: reading both, saving pages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from batchnorm.cli.command import RUNS, say_written, working
from batchnorm.cli.data import SPELLINGS, read_inputs, shifted
from batchnorm.models.files import FileError, Model, naming, read, whole

Data = Annotated[str, typer.Argument(metavar="DATA", help=SPELLINGS)]
MaxBatches = Annotated[int | None, typer.Option(min=1, help="How many calls at most.")]
Html = Annotated[Path | None, typer.Option(help="A page with table, picture, and what to do.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="All numbers; - for the standard output."),
]
STDOUT = "-"


def read_both(
    model: Path,
    data: str,
    batch_size: int | None,
    *,
    shift: str | None = None,
    held_out: bool = False,
) -> tuple[Model, tuple[Tensor, ...], int, int]:
    """Return a model, data, how many examples go into a call, and how many are left at the end.

    Args:
        model: The model's file.
        data: What is called the data; see `read_inputs`.
        batch_size: How many examples were asked for.
        shift: The shift that pictures are given first; see `shifted`.
        held_out: See `read_inputs`.
    """
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


def check_pages(html: Path | None, json_file: str | None, *read: object) -> None:
    """Raise unless files can be written there, before what takes its time is done.

    Args:
        html: The file of the page, if one is wanted.
        json_file: The file of the JSON, or `-`, if that is wanted.
        read: What the command reads, which may be files.
    """
    taken = {Path(str(each)).expanduser().resolve() for each in read}
    for option, path in _files(html, json_file).items():
        where = f"{option} {path}"
        if path.expanduser().resolve() in taken:
            raise FileError("is a file that the command needs; name another one", where)
        taken.add(path.expanduser().resolve())
        if not path.parent.is_dir():
            raise FileError(f"{path.parent} is no folder; make it, or name another one", where)
        if path.is_dir():
            raise FileError("is a folder; name a file in it", where)


def save(
    html: Path | None, json_file: str | None, page: Callable[[], str], found: Mapping[str, Any]
) -> None:
    """Write what was found, as a page and as JSON, each whole or not at all.

    Args:
        html: The file of the page, if one is wanted.
        json_file: The file of the JSON, or `-`, if that is wanted.
        page: Makes the page.
        found: What was found, as plain data.
    """
    text = json.dumps(finite(found), indent=2, allow_nan=False)
    if json_file == STDOUT:
        print(text)
    elif json_file is not None:
        _put("--json", Path(json_file), text + "\n")
    if html is not None:
        with working("drawing"):
            content = page()
        _put("--html", html, content)
    if json_file != STDOUT:
        for path in _files(html, json_file).values():
            say_written(path)


def finite(value: Any) -> Any:
    """Return plain data as JSON has them: without numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _files(html: Path | None, json_file: str | None) -> dict[str, Path]:
    named = {"--html": html, "--json": None if json_file in (None, STDOUT) else Path(json_file)}
    return {option: path for option, path in named.items() if path is not None}


def _put(option: str, path: Path, content: str) -> None:
    try:
        with whole(path) as partial:
            partial.write_text(content, encoding="utf-8")
    except OSError as error:
        raise FileError(f"{error.strerror}; name another file", f"{option} {path}") from error
