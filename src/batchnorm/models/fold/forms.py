"""The forms of a model that can be folded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from batchnorm.models.capture import unwrapped
from batchnorm.models.fold.graph import Graph
from batchnorm.models.fold.module import ModuleForm
from batchnorm.models.fold.plan import Plan
from batchnorm.models.walk import Where


class Form(Protocol):
    """A model, what it computes, and how it is folded.

    Attributes:
        graph: What it computes.
        tensors: Its tensors, by name.
        names: The layers that may be folded.
        left: Why some of them cannot be.
        expected: What it returns.
    """

    graph: Graph
    tensors: dict[str, Tensor]
    names: list[str]
    left: dict[str, str]
    expected: Any

    def run(self, model: Any) -> Any:
        """Return what a model of this form returns for the example."""

    def apply(self, plan: Plan) -> Any:
        """Return another model with the batch norms of a plan folded."""


def form_of(
    model: object,
    example: Sequence[Any] | None,
    keywords: Mapping[str, Any],
    where: Where,
    is_verified: bool,
    inplace: bool,
) -> Form:
    """Return the form that a model has.

    Args:
        model: The model.
        example: The arguments of a call.
        keywords: The keywords of that call.
        where: Which layers may be folded.
        is_verified: Whether what is folded is run.
        inplace: Whether activations of a module may write over what was folded.

    Raises:
        TypeError: It has none.
        ValueError: It is in training mode, an example is missing, or `where` names no layer.
    """
    if isinstance(model, nn.Module):
        # a copy of what torch.compile made would run the first one
        module = unwrapped(model)
        if example is None:
            raise ValueError(
                "example is missing: what a module computes is seen when it is called; pass the "
                "arguments of a call"
            )
        return ModuleForm(module, example, keywords, where, is_verified, inplace)
    if inplace:
        raise TypeError(
            "inplace is of modules alone: a program or an ONNX model has no activations"
        )
    # what is not imported yet is not what the model is
    if "torch.export" in sys.modules:
        from torch.export import ExportedProgram

        if isinstance(model, ExportedProgram):
            from batchnorm.models.fold.program import ProgramForm

            return ProgramForm(model, example, keywords, where, is_verified)
    if "onnx" in sys.modules:
        from onnx import ModelProto

        if isinstance(model, ModelProto):
            from batchnorm.models.fold.onnx_form import OnnxForm

            return OnnxForm(model, example, keywords, where, is_verified)
    raise TypeError(
        f"model is a {type(model).__module__}.{type(model).__name__}: expected a torch.nn.Module, "
        "a program of torch.export, or an onnx.ModelProto (load a file by torch.export.load or "
        "onnx.load)"
    )
