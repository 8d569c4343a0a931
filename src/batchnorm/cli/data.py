"""What a command line names as data, as the inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.models.programs.inputs import Inputs
from batchnorm.study.data import FORMS, load
from batchnorm.study.errors import DataError, reading, wrong
from batchnorm.study.shifts import SEVERITIES, SHIFTS, shift

#: For the help texts.
SPELLINGS = f"FILE.npy, FILE.npz, {', '.join(form.spelling for form in FORMS)}."


def read_inputs(spec: str, inputs: Inputs, *, held_out: bool = False) -> tuple[Tensor, ...]:
    """Return data as the inputs of a model: all examples of each.

    Args:
        spec: A file of one array, `.npy`; of arrays, `.npz`: one for each input, by its name, or
            `x`, or the only one; or what `batchnorm study --data` takes, whose training inputs are
            used.
        inputs: What the model takes.
        held_out: Whether of what has training and test inputs the latter are used.

    Raises:
        DataError: The data cannot be read.
        FileError: They are not what the model takes.
    """
    if spec.partition(":")[0] in {form.kind for form in FORMS}:
        found = load(spec)
        pictures: NDArray[Any] = found.test_inputs if held_out else found.train_inputs
        if len(inputs.tensors[0].shape) == 2 and pictures.shape[2:] == (1, 1):
            pictures = pictures[:, :, 0, 0]  # features
        return inputs.matched(spec, {"x": pictures})
    path = Path(spec).expanduser()
    if path.suffix not in (".npy", ".npz"):
        raise wrong(spec, "unknown data", SPELLINGS.rstrip("."), "name one of these")
    if not path.is_file():
        raise wrong(path, "no such file", f"a {path.suffix} file", "check the spelling")
    names = [tensor.name for tensor in inputs.tensors]
    with reading(path):
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            arrays = {"x": stored}
        else:
            with stored:
                arrays = {name: stored[name] for name in _chosen(stored.files, names)}
    return inputs.matched(path, arrays)


def shifted(spec: str, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return inputs after a shift of the study's: those that are pictures.

    Args:
        spec: Its name and severity, as `blur:3`.
        values: The inputs; the range of the pictures is that of their values.

    Raises:
        DataError: There is no such shift or severity, or it does not apply.
    """
    name, _, severity = spec.partition(":")
    pictures = [value.ndim == 4 and value.is_floating_point() for value in values]
    where = f"--shift {spec}"
    if name not in SHIFTS or severity not in map(str, SEVERITIES):
        expected = f"NAME:SEVERITY, {', '.join(SHIFTS)}, and {SEVERITIES[0]} to {SEVERITIES[-1]}"
        raise wrong(where, "no such shift", expected, "name one of these")
    if not any(pictures):
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise wrong(where, f"data of shape {shapes}", "pictures, (N, C, H, W)", "leave it out")

    def change(x: Tensor) -> Tensor:
        array = x.float().numpy()
        low, high = float(array.min()), float(array.max())
        try:
            moved = shift(array, name, int(severity), low=low, high=high)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        return torch.from_numpy(np.ascontiguousarray(moved)).to(x.dtype)

    return tuple(change(x) if it else x for x, it in zip(values, pictures, strict=True))


def _chosen(stored: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """Return which arrays of a file are meant: those of the inputs' names, or one alone."""
    if set(names) <= set(stored):
        return names
    return ["x"] if len(names) == 1 and "x" in stored else stored
