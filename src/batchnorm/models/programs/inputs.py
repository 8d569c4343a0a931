"""What an exported model is called with, and data cut into such calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.models.files import FileError

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

#: How many examples go into a call, where the model takes any number.
BATCH_SIZE = 64

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Input:
    """A tensor that a model takes.

    Attributes:
        name: Its name.
        shape: Its sizes; None for one that may vary.
        dtype: The type of its values.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def spelling(self) -> str:
        """The shape, as an error says it: (N, 1, 8, 8)."""
        told = [
            ("?" if at else "N") if size is None else str(size)
            for at, size in enumerate(self.shape)
        ]
        return f"({', '.join(told)}{',' if len(told) == 1 else ''})"

    def takes(self, shape: Sequence[int]) -> bool:
        """Return whether examples of this shape, any number of them, can be its values."""
        return len(shape) == len(self.shape) and all(
            wanted in (None, size) for wanted, size in zip(self.shape[1:], shape[1:], strict=True)
        )


@dataclass(frozen=True)
class Inputs:
    """All tensors that a model takes.

    Attributes:
        tensors: They, in their order.
        example: One call's values, where the model brings them.
        arguments: Makes of a call's values the positional arguments and the keywords.
    """

    tensors: tuple[Input, ...]
    example: tuple[Tensor, ...] | None
    arguments: Callable[[Sequence[Tensor]], Arguments]

    @property
    def batch_size(self) -> int | None:
        """The only number of examples that the model takes; None if it takes any."""
        sizes = {tensor.shape[0] for tensor in self.tensors if tensor.shape}
        return next((size for size in sizes if size is not None), None)

    def chosen_batch_size(self, wanted: int | None) -> int:
        """Return how many examples go into a call.

        Args:
            wanted: How many were asked for, or None.

        Raises:
            FileError: The model takes another number.
        """
        fixed = self.batch_size
        if fixed is not None and wanted not in (None, fixed):
            raise FileError(
                f"--batch-size {wanted}: the model takes exactly {fixed} examples at a time; "
                "leave --batch-size out, or export it with a dynamic first dimension"
            )
        return fixed or wanted or BATCH_SIZE

    def drawn(self, wanted: int | None = None) -> tuple[Tensor, ...]:
        """Return values for one call: those that the model brings, or standard normal ones.

        Args:
            wanted: How many examples; what the model brings, or two, if left out.

        Raises:
            FileError: The model takes another number of examples, or a size is not known.
        """
        if self.example is not None and wanted in (None, len(self.example[0])):
            return self.example
        count = self.chosen_batch_size(wanted or 2)
        generator, values = torch.Generator().manual_seed(0), []
        for at, tensor in enumerate(self.tensors):
            known = tensor.shape if self.example is None else tuple(self.example[at].shape)
            free = bool(tensor.shape) and tensor.shape[0] is None
            sizes = [count if free and dim == 0 else size for dim, size in enumerate(known)]
            if None in sizes:
                raise FileError(
                    f"the input {tensor.name!r} is of shape {tensor.spelling}, of which more than "
                    "the number of examples may vary; give --data"
                )
            shape = [size for size in sizes if size is not None]
            if tensor.dtype.is_floating_point:
                values.append(torch.randn(shape, generator=generator).to(tensor.dtype))
            else:  # which may be indices
                values.append(torch.zeros(shape, dtype=tensor.dtype))
        return tuple(values)

    def matched(self, where: object, arrays: Mapping[str, NDArray[Any]]) -> tuple[Tensor, ...]:
        """Return data as what the model takes.

        Args:
            where: Where they are from, for an error.
            arrays: They, by name: those of the inputs; or one alone, by any.

        Raises:
            FileError: They are not what the model takes.
        """
        if len(arrays) == 1 and len(self.tensors) == 1:
            arrays = {self.tensors[0].name: next(iter(arrays.values()))}
        missing = [tensor.name for tensor in self.tensors if tensor.name not in arrays]
        if missing:
            raise FileError(
                f"got {', '.join(arrays)}, expected an array for each input of the model, "
                f"{', '.join(tensor.name for tensor in self.tensors)}",
                where,
            )
        values = tuple(_converted(where, t, arrays[t.name]) for t in self.tensors)
        counts = {len(value) for value in values}
        if len(counts) != 1:
            raise FileError(f"got {sorted(counts)} examples, expected as many in each array", where)
        return values


def batches(values: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Give the values of one call after the other; the last may have fewer examples."""
    return zip(*(torch.split(value, size) for value in values), strict=True)


def inputs_of_program(program: ExportedProgram) -> Inputs:
    """Return what a program takes.

    Raises:
        FileError: It takes no tensor.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    leaves: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            continue
        value = nodes[spec.arg.name].meta["val"] if spec.arg.name in nodes else None
        if isinstance(value, Tensor):
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
            leaves.append(Input(spec.arg.name, shape, value.dtype))
        elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise FileError(f"the input {spec.arg.name!r} is a number: export it as a constant")
        else:
            leaves.append(getattr(spec.arg, "value", None))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Input))
    if not tensors:
        raise FileError("the model takes no tensor")
    given = pytree.tree_leaves(program.example_inputs or ())
    example = tuple(value for value in given if isinstance(value, Tensor))
    structure = program.call_spec.in_spec
    assert structure is not None  # of a program that was exported

    def arguments(values: Sequence[Tensor]) -> Arguments:
        rest = iter(values)
        filled = [next(rest) if isinstance(leaf, Input) else leaf for leaf in leaves]
        args, keywords = pytree.tree_unflatten(filled, structure)
        return tuple(args), dict(keywords)

    return Inputs(tensors, example if len(example) == len(tensors) else None, arguments)


def inputs_of_onnx(model: ModelProto) -> Inputs:
    """Return what an ONNX model takes.

    Raises:
        FileError: It takes no tensor, or one of a type that NumPy does not have.
    """
    import onnx

    inside = {tensor.name for tensor in model.graph.initializer}
    tensors = []
    for value in model.graph.input:
        if value.name in inside:  # a default, as old files have one for each weight
            continue
        kind = value.type.tensor_type
        try:
            numbers = np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
            dtype = torch.from_numpy(numbers).dtype
        except (KeyError, TypeError, ValueError):
            raise FileError(
                f"the input {value.name!r} is no tensor of a type that NumPy has"
            ) from None
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        tensors.append(Input(value.name, shape, dtype))
    if not tensors:
        raise FileError("the model takes no tensor")
    return Inputs(tuple(tensors), None, lambda values: (tuple(values), {}))


def _converted(where: object, tensor: Input, array: NDArray[Any]) -> Tensor:
    """Return an array as the values of an input, if it loses nothing that matters."""
    got, wanted = array.dtype, tensor.dtype
    is_float = got.kind == "f" and wanted.is_floating_point
    is_whole = got.kind in "iub" and not wanted.is_floating_point and not wanted.is_complex
    if not (is_float or is_whole):
        raise FileError(
            f"got values of type {got.name}, expected {str(wanted).removeprefix('torch.')} for the "
            f"input {tensor.name!r}; convert them as for training",
            where,
        )
    if not tensor.takes(array.shape):
        raise FileError(
            f"got shape {array.shape}, expected {tensor.spelling}, the input {tensor.name!r} of "
            "the model; name other data, or reshape them",
            where,
        )
    if len(array) == 0:
        raise FileError("got no examples, expected one or more", where)
    native = array.astype(got.newbyteorder("="), order="C")
    found = torch.from_numpy(native).to(wanted)
    if is_float and not bool(found.isfinite().all()):
        raise FileError(
            "got values that are NaN, infinite or too large, expected finite "
            f"{str(wanted).removeprefix('torch.')} values; remove or replace them",
            where,
        )
    return found
