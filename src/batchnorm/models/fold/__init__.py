"""Folding: batch norms taken into the convolutions and linear layers beside them, for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from batchnorm.models.capture import arguments
from batchnorm.models.compare import default_tolerance, largest_error
from batchnorm.models.fold.forms import form_of
from batchnorm.models.fold.plan import plan
from batchnorm.models.fold.report import FoldReport as FoldReport
from batchnorm.models.fold.verify import Attempt, measured, settle
from batchnorm.models.walk import Where

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

    Model = TypeVar("Model", nn.Module, ExportedProgram, ModelProto)


def fold(
    model: Model,
    example: Sequence[Any] | Tensor | None = None,
    *,
    keywords: Mapping[str, Any] | None = None,
    verify: bool = True,
    tol: float | None = None,
    where: Where = None,
    inplace: bool = False,
) -> tuple[Model, FoldReport]:
    """Return a model without the batch norms that others can take in, for inference.

    Those after a convolution, transposed or not, or a linear layer, and those before one. What is
    folded is decided by the graph of the operations that the example runs, and not by the order of
    the modules; what the graph does not prove is left as it is, with the reason. Then the new model
    is run beside the old one, and a layer that makes the error too large is left, too.

    Args:
        model: A module, a program of `torch.export`, or an ONNX model, in evaluation; it is left as
            it is. Of a compiled module, the one that was compiled is folded.
        example: The arguments of a call; a tensor is the only one. Of a program it may be left out
            if it has its own, of an ONNX model if nothing is verified.
        keywords: The keywords of that call; of an ONNX model, inputs by name.
        verify: Whether the new model is run, and compared with the old one.
        tol: How large the error may be, relative to the largest value of each output; if left out,
            1e-10 in float64, 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16, whichever is the
            coarsest of the model and its outputs.
        where: Which layers; see `freeze`. In programs and ONNX models, by patterns of names alone.
        inplace: Of a module, whether activations that alone read what was folded, in the graph of
            the example, write over it. That is faster, and wrong where the model takes another path
            on which something else reads it, or for a hook that keeps it.

    Returns:
        The new model, and a report: what was folded into what, what was left and why, the error.

    Raises:
        TypeError: The model is none of these, or `example` is neither a tensor nor a sequence, or
            `inplace` is asked of what is no module.
        ValueError: The model is in training mode or was exported in it, does not answer the same
            twice, or with no finite number to compare; there is no example, or `where` names no
            layer.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded, report = bn.fold(model, torch.randn(2, 3, 16, 16))
        >>> report.folded, report.left
        ({'1': ['0']}, {})
        >>> folded[1]
        Identity()
    """
    args = None if example is None else arguments(example)
    form = form_of(model, args, keywords or {}, where, verify, inplace)
    done = plan(form.graph, form.tensors, form.names)
    left, error = {**form.left, **done.left}, None
    if verify:
        largest_error(form.expected, form.expected)  # or else there is nothing to compare
        if tol is None:
            tol = default_tolerance((list(form.tensors.values()), form.expected))

        def attempt(names: Sequence[str]) -> Attempt:
            some = plan(form.graph, form.tensors, names)
            return measured(some, form.expected, lambda: form.run(form.apply(some)))

        (done, error, _), blamed = settle(list(done.folded), attempt, tol)
        left |= done.left | blamed
    report = FoldReport(
        {name: done.into(name) for name in form.names if name in done.folded},
        {name: left[name] for name in form.names if name not in done.folded},
        error,
        tol if verify else None,
    )
    return form.apply(done), report  # one that has not run: some models remember their calls
