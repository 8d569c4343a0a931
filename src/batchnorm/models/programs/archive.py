"""Archives of `torch.export`, loaded without unpickling, and without running what lies in them.

What is loaded is another archive, written anew from what was looked at and understood. So it does
not matter whether two readers of ZIP or JSON would see the same in a file.
"""

from __future__ import annotations

import io
import json
import keyword
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.models.files import FileError
from batchnorm.models.programs.vetting import can_be_quoted, vet

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MODEL = "models/model.json"
_SAMPLE = "data/sample_inputs/model.pt"
#: Records that are text, each by its path; and those that are numbers.
_JSON = (
    _MODEL,
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_NUMBERS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+", re.ASCII)
_EXTRA = "extra/"
#: What the writer of an archive adds itself.
_ADDED = re.compile(r"archive_format|archive_version|byteorder|version|\.data/.*", re.ASCII)

_EXTRA_FILES = "_batchnorm_extra_files"


def load(path: Path) -> ExportedProgram:
    """Load a program.

    Args:
        path: A file that `torch.export.save` wrote.

    Returns:
        The program. What else was saved with it is saved with it again by `save`.

    Raises:
        FileError: Something in the file could run code.
    """
    from torch.export.pt2_archive._package import load_pt2

    archive = _rewritten(io.BytesIO(path.read_bytes()))
    with _quiet():
        found = load_pt2(archive)
    program = found.exported_programs["model"]
    setattr(program, _EXTRA_FILES, found.extra_files)
    return program


def save(program: Any, path: Path, source: Any) -> None:
    """Save a program as `torch.export.save` does, under any name.

    Args:
        program: The program.
        path: The file.
        source: The program that was loaded, and that this one was made of.
    """
    with path.open("wb") as file, _quiet():
        torch.export.save(program, file, extra_files=getattr(source, _EXTRA_FILES, {}))


def _rewritten(file: io.BytesIO) -> io.BytesIO:
    """Return a new archive of what may be loaded from one."""
    from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

    reader, written = PT2ArchiveReader(file), io.BytesIO()
    names = reader.get_file_names()
    if _MODEL not in names:
        raise FileError("it has no program named 'model'; save it with torch.export.save")
    with PT2ArchiveWriter(written) as writer:
        for name in names:
            if name in _JSON:
                content = json.loads(reader.read_bytes(name))
                vet(content)
                writer.write_string(name, json.dumps(content))
            elif name == _SAMPLE:
                writer.write_bytes(name, _sample(reader.read_bytes(name)))
            elif _NUMBERS.fullmatch(name) or name.startswith(_EXTRA):
                writer.write_bytes(name, reader.read_bytes(name))
            elif not _ADDED.fullmatch(name):
                raise FileError(
                    f"it has {name!r}, which is no part of a plain program: pickled objects and "
                    "compiled libraries are not loaded"
                )
        _register_results(json.loads(reader.read_bytes(_MODEL)))
    written.seek(0)
    return written


def _sample(raw: bytes) -> bytes:
    """Return the example inputs that were saved with a program, pickled anew."""
    if not raw:
        return raw
    try:
        inputs = torch.load(io.BytesIO(raw), weights_only=True)
    except Exception as error:
        raise FileError("its example inputs are pickled objects and not plain tensors") from error
    if not isinstance(inputs, tuple) or not _is_plain(inputs):
        raise FileError("its example inputs are no tensors and numbers under plain names")
    saved = io.BytesIO()
    torch.save(inputs, saved)
    return saved.getvalue()


def _is_plain(value: Any) -> bool:
    """Return whether there are only numbers, and tensors, under names that can stand in code."""
    if isinstance(value, dict):
        return all(
            isinstance(key, str) and key.isidentifier() and key.isascii()
            and not keyword.iskeyword(key) and _is_plain(content)
            for key, content in value.items()
        )  # fmt: skip
    if isinstance(value, list | tuple):
        return all(_is_plain(content) for content in value)
    if isinstance(value, str):
        return can_be_quoted(value)
    return value is None or isinstance(
        value, bool | int | float | Tensor | torch.dtype | torch.device
    )


class _Result(list[Any]):
    """What stands for an object of another package that a program returns.

    Attributes:
        context: What is known of it: mostly the names of its entries.
    """

    context: Any = None


def _register_results(content: Any) -> None:
    """Let programs return objects of classes that are not there, as those of Transformers.

    Their names are all that a file has of them; importing what it names would run code. They are
    saved again as they were.
    """
    for entry in content["graph_module"]["module_call_graph"]:
        if entry.get("signature"):
            _, spec = json.loads(entry["signature"]["out_spec"])
            _register(spec)


def _register(spec: Any) -> None:
    name = spec["type"]
    if name is not None and name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        kind = type(name.rpartition(".")[2], (_Result,), {})

        def unflatten(values: Any, context: Any) -> _Result:
            made: _Result = kind(values)
            made.context = context
            return made

        pytree.register_pytree_node(
            kind,
            lambda result: (list(result), result.context),
            unflatten,
            serialized_type_name=name,
            to_dumpable_context=lambda context: context,
            from_dumpable_context=lambda context: context,
            flatten_with_keys_fn=lambda result: (
                [(pytree.SequenceKey(at), value) for at, value in enumerate(result)],
                result.context,
            ),
        )
    for child in spec["children_spec"]:
        _register(child)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's loggers from writing inside, as they do before an error is raised."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
