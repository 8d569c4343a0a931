"""ONNX files, whose weights may lie in other files: beside them, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from batchnorm.models.files import FileError

if TYPE_CHECKING:
    from onnx import ModelProto

#: What a protobuf message, and so a file with its weights inside, has room for.
_LARGEST = 2**31 - 1


def load_onnx(path: Path) -> ModelProto:
    """Load an ONNX model with its weights, and check it.

    Args:
        path: The file.

    Raises:
        FileError: It is no valid model, or reaches for files that do not lie beside it.
    """
    import onnx
    from onnx import external_data_helper as external

    model = onnx.load_model_from_string(path.read_bytes())
    for tensor in parts(model, "TensorProto"):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if len(locations) != 1:  # of which others may take the last
            raise FileError(f"it keeps {tensor.name!r} in {len(locations)} files: expected one")
        _check_beside(path.parent, locations[0])
        external.load_external_data_for_tensor(tensor, str(path.parent))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise FileError(
            f"it is no valid ONNX model, '{str(error).strip().splitlines()[0]}'"
        ) from None
    return model


def save_onnx(model: Any, path: Path) -> None:
    """Save an ONNX model with its weights inside.

    Args:
        model: The model.
        path: The file.

    Raises:
        FileError: It does not fit into one file.
    """
    if model.ByteSize() > _LARGEST:
        raise FileError("the model is over 2 GB, which an ONNX file with its weights cannot hold")
    path.write_bytes(model.SerializeToString())


def parts(message: Any, kind: str) -> Iterator[Any]:
    """Give all messages of a kind in another, wherever they are: in graphs, nodes, functions.

    Args:
        message: A protobuf message.
        kind: What its type is called, as `TensorProto`.
    """
    if message.DESCRIPTOR.name == kind:
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if hasattr(value, "add") else [value]:
                yield from parts(inner, kind)


def _check_beside(folder: Path, location: str) -> None:
    """Raise unless the file of a tensor lies in a folder, or below it, and is no link elsewhere."""
    for path in (PurePosixPath(location), PureWindowsPath(location)):
        if not location or path.is_absolute() or path.drive or ".." in path.parts:
            raise FileError(f"it keeps weights in {location!r}: expected a file beside it")
    file = folder / location
    if not file.is_file():
        raise FileError(f"its weights are in {location!r}, which does not lie beside it")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"its weights are in {location!r}, a link to another folder")
