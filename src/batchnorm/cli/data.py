"""What a command line names as data, as the inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.models.programs.inputs import Inputs
from batchnorm.study.data import FORMS, load
from batchnorm.study.errors import reading, wrong

#: For the help texts.
SPELLINGS = f"FILE.npy, FILE.npz, {', '.join(form.spelling for form in FORMS)}."


def read_inputs(spec: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return data as the inputs of a model: all examples of each.

    Args:
        spec: A file of one array, `.npy`; of arrays, `.npz`: one for each input, by its name, or
            `x`, or the only one; or what `batchnorm study --data` takes, whose training inputs are
            used.
        inputs: What the model takes.

    Raises:
        DataError: The data cannot be read.
        FileError: They are not what the model takes.
    """
    if spec.partition(":")[0] in {form.kind for form in FORMS}:
        pictures: NDArray[Any] = load(spec).train_inputs
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
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            arrays = {"x": found}
        else:
            with found:
                arrays = {name: found[name] for name in _chosen(found.files, names)}
    return inputs.matched(path, arrays)


def _chosen(stored: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """Return which arrays of a file are meant: those of the inputs' names, or one alone."""
    if set(names) <= set(stored):
        return names
    return ["x"] if len(names) == 1 and "x" in stored else stored
