"""Model files, `.pt2` and `.onnx`: read without running anything in them, and written whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

#: What a file holds.
Model: TypeAlias = "ExportedProgram | ModelProto"

#: How the names of such files end.
PROGRAM, ONNX = ".pt2", ".onnx"


class FileError(ValueError):
    """Something is wrong with a model's file, or with what it is to be used for.

    Args:
        message: What was got, what was expected, and the way out. It becomes one printable line,
            whatever names a file brings into it.
        where: The file, if it is known; else `naming` adds it.
    """

    def __init__(self, message: str, where: object = None) -> None:
        line = " ".join(message.split() if where is None else [f"{where}:", *message.split()])
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))
        self.where = where


class NotVerified(ArithmeticError):
    """What was made differs from what it should be by more than is allowed; nothing is written."""


def read(path: Path, *, named: Path | None = None) -> Model:
    """Read a model.

    Args:
        path: A file that `torch.export.save` wrote, or an ONNX file.
        named: What errors call it, if not that.

    Raises:
        FileError: It is not there, of another kind, damaged, or has something in it that could run
            code, or that reaches for files elsewhere.
    """
    suffix = kind(path)
    with naming(
        named or path, "it cannot be read; export it again with this version of torch or onnx"
    ):
        if suffix == PROGRAM:
            from batchnorm.models.programs.archive import load

            return load(path)
        from batchnorm.models.programs.protobuf import load_onnx

        return load_onnx(path)


def write(
    path: Path,
    model: Model,
    check: Callable[[Model], None] | None = None,
    *,
    source: Model | None = None,
) -> None:
    """Write a model: whole, or not at all.

    Args:
        path: Where to; a file that is there is replaced at the end.
        model: The model, of the kind that the path's name ends with.
        source: The model that was read and that it was made of; what else was saved with that is
            saved with this one.
        check: Is given what the file, read again, has, before it gets its name. What it raises
            leaves no file.

    Raises:
        FileError: The file cannot be written.
    """
    try:
        with whole(path) as partial:
            if kind(path) == PROGRAM:
                from batchnorm.models.programs.archive import save

                save(model, partial, model if source is None else source)
            else:
                from batchnorm.models.programs.protobuf import save_onnx

                save_onnx(model, partial)
            if check is not None:
                check(read(partial, named=path))
    except (FileError, NotVerified, ModuleNotFoundError):
        raise
    except OSError as error:
        raise FileError(
            f"{error.strerror or error}; name a file in a folder that can be written to, and in "
            "which there is room",
            path,
        ) from error
    except Exception as error:  # of torch or onnx, about what the model has
        raise FileError(f"{_first_line(error)}: it cannot be saved as it is", path) from error


def kind(path: Path) -> str:
    """Return how the name of a model's file ends.

    Raises:
        FileError: In another way.
    """
    suffix = path.suffix.lower()
    if suffix not in (PROGRAM, ONNX):
        raise FileError(
            f"expected a name that ends in {PROGRAM} (torch.export.save) or {ONNX}", path
        )
    return suffix


def check_paths(model: Path, out: Path) -> None:
    """Raise unless a model can be read from a file, and another of its kind be written.

    Raises:
        FileError: It cannot.
    """
    where = f"--out {out}"
    if kind(model) != kind(out):
        raise FileError(f"expected a {kind(model)} file, as {model} is one", where)
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} is no folder; make it, or name another one", where)
    if out.is_dir():
        raise FileError("is a folder; name a file in it", where)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Let a file be written under another name beside, and give it its own once it is whole.

    Where anything goes wrong inside, Ctrl-C too, nothing is left, and what was there remains.

    Args:
        path: The file.

    Yields:
        The name to write under, which ends as the file's own does.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path, otherwise: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into an error of one line that names a file.

    Args:
        path: The file.
        otherwise: What to say of an error that says nothing of the file itself.

    Raises:
        FileError: Something went wrong.
    """
    try:
        yield
    except (ModuleNotFoundError, NotVerified):
        raise
    except FileError as error:
        raise error if error.where is not None else FileError(str(error), path) from error
    except OSError as error:
        raise FileError(f"{error.strerror or error}; name a file that is there", path) from error
    except Exception as error:  # a parser that is fed damaged bytes may raise anything
        raise FileError(f"{_first_line(error)}: {otherwise}", path) from error


def _first_line(error: Exception) -> str:
    """Return what an error says, as a part of one line."""
    reason = (str(error).strip() or "no message").splitlines()[0][:200]
    return f"{type(error).__name__}, '{reason}'"
