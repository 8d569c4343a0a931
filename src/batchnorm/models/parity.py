"""Parity: whether a model computes the same compiled, exported and in ONNX Runtime."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from textwrap import fill
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from batchnorm.models.batches import Buffers, Modes
from batchnorm.models.capture import VERSIONS, arguments, as_written, is_batch_norm, unwrapped
from batchnorm.models.compare import default_tolerance, largest_error
from batchnorm.models.fold.copies import cloned, seeded

#: The ways that a model can run in, beside eager evaluation.
WAYS = ("compiled", "exported", "onnx")

_ONNX = ("onnx", "onnxscript", "onnxruntime")
_STANDARD = {"aten::batch_norm", "aten::_native_batch_norm_legit_no_training"}
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


@dataclass
class Way:
    """What came of one way.

    Attributes:
        way: Its name.
        error: The largest difference from eager evaluation, relative to the largest value of each
            tensor; None where the way did not come to an output.
        tolerance: How large that may be.
        nodes: How many standard batch norms its graph has, or None where there is no graph.
        verdict: Whether it `"agrees"`, `"differs"`, `"failed"`, or was `"not tried"`.
        reason: Why it failed or was not tried, or else empty.
    """

    way: str
    error: float | None
    tolerance: float
    nodes: int | None
    verdict: str
    reason: str = ""


@dataclass(repr=False)
class ParityReport:
    """How a model computes in each way, beside eager evaluation.

    Attributes:
        ways: What came of each, in the order in which they were asked for.
    """

    ways: list[Way]

    @property
    def ok(self) -> bool:
        """Whether every way that was tried agrees, and at least one was."""
        tried = [way for way in self.ways if way.verdict != "not tried"]
        return bool(tried) and all(way.verdict == "agrees" for way in tried)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {"ok": self.ok, **asdict(self)}

    def __repr__(self) -> str:
        agree = sum(way.verdict == "agrees" for way in self.ways)
        lines = [
            f"{agree} of {len(self.ways)} ways agree with eager evaluation",
            f"  {'way':9} {'error':>8}  {'tolerance':>9}  {'batch norms':>11}  verdict",
        ]
        for way in self.ways:
            error = "-" if way.error is None else f"{way.error:.1e}"
            nodes = "-" if way.nodes is None else way.nodes
            lines.append(
                f"  {way.way:9} {error:>8}  {way.tolerance:>9.0e}  {nodes:>11}  {way.verdict}"
            )
            if way.reason:
                lines.append(
                    fill(way.reason, 80, initial_indent=" " * 4, subsequent_indent=" " * 4)
                )
        return "\n".join(lines)


def check_parity(
    model: nn.Module,
    example: Sequence[Any] | Tensor,
    *,
    keywords: Mapping[str, Any] | None = None,
    tol: float | None = None,
    ways: Sequence[str] | None = None,
) -> ParityReport:
    """Run a model in evaluation in several ways, and compare every output with the eager one.

    The ways are: `"compiled"` by `torch.compile`, with inductor if there is a C++ compiler;
    `"exported"` by `torch.export`, saved, and loaded; `"onnx"`, exported by `torch.onnx` and run
    in ONNX Runtime. One that fails is reported with its error, and one whose packages are missing
    as not tried. The model is left as it was, in its mode and with its buffers. What it draws is
    the same each time, and leaves the state of random numbers.

    Args:
        model: The model.
        example: The arguments of a call; a tensor is the only one.
        keywords: Its keywords.
        tol: How large the error may be, relative to the largest value of each tensor; if left out,
            1e-10 in float64, 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16, whichever is the
            coarsest of the model and its outputs.
        ways: Which of the ways; all if left out.

    Returns:
        For each way the error, the number of standard batch-norm nodes in its graph, and whether
        it agrees. `ok` is whether all that were tried do.

    Raises:
        TypeError: `model` is no module, or `example` neither a tensor nor a sequence.
        ValueError: There is no such way, or no floating-point output to compare.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 5), bn.BatchNorm1d(5, activation="relu"))
        >>> report = bn.check_parity(model, torch.randn(8, 3), ways=["exported"])
        >>> report.ok, report.ways[0].nodes
        (True, 1)
    """
    chosen = (ways,) if isinstance(ways, str) else tuple(WAYS if ways is None else ways)
    if not chosen or (unknown := [way for way in chosen if way not in WAYS]):
        got = ", ".join(map(repr, unknown)) if chosen else "empty"
        raise ValueError(f"ways has {got}: expected some of {', '.join(map(repr, WAYS))}")
    model, call = unwrapped(model), (arguments(example), dict(keywords or {}))
    modes, buffers, tensors = Modes(model), Buffers(model), list(model.parameters())
    rows = []
    try:
        with torch.no_grad():
            model.eval()
            with as_written(model), seeded(tensors):
                expected = cloned(_run(model, call))
            largest_error(expected, expected)  # or else there is nothing to compare
            if tol is None:
                tol = default_tolerance((tensors, expected))
            for way in chosen:
                buffers.restore()
                with as_written(model), seeded(tensors):
                    rows.append(_try(way, model, call, expected, tol))
    finally:
        modes.restore()
        buffers.restore()
    return ParityReport(rows)


#: The arguments and the keywords of a call.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _run(function: Any, call: _Call) -> Any:
    args, keywords = cloned(call)
    return function(*args, **keywords)


def _try(way: str, model: nn.Module, call: _Call, expected: Any, tol: float) -> Way:
    missing = [name for name in _ONNX if way == "onnx" and find_spec(name) is None]
    if missing:
        reason = f"{', '.join(missing)} missing: pip install {' '.join(_ONNX)}"
        return Way(way, None, tol, None, "not tried", reason)
    run = {"compiled": _compiled, "exported": _exported, "onnx": _through_onnx}[way]
    nodes: list[int] = []
    try:
        with _quiet():
            found = run(model, call, nodes)
        if way == "onnx":  # which has no structure, and tensors alone
            expected = [v for v in pytree.tree_leaves(expected) if isinstance(v, Tensor)]
        error = largest_error(expected, found)
    except Exception as failure:  # of any kind: it is what the report is about
        return Way(way, None, tol, sum(nodes) if nodes else None, "failed", _reason(failure))
    return Way(way, error, tol, sum(nodes), "agrees" if error <= tol else "differs")


def _compiled(model: nn.Module, call: _Call, nodes: list[int]) -> Any:
    from torch._dynamo import config, lookup_backend

    compiler = os.environ.get("CXX") or "g++"
    inductor = any(map(shutil.which, (compiler, "clang++", "cl")))
    inner = lookup_backend("inductor" if inductor else "aot_eager")

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes.append(sum(map(is_batch_norm, _nodes(graph))))
        return inner(graph, inputs)

    with config.patch(recompile_limit=VERSIONS, accumulated_recompile_limit=VERSIONS):
        return _run(torch.compile(model, backend=backend, dynamic=False), call)


def _exported(model: nn.Module, call: _Call, nodes: list[int]) -> Any:
    program, file = torch.export.export(model, *cloned(call)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    names = (getattr(node.target, "name", str)() for node in _nodes(program.graph_module))
    nodes.append(sum(name.partition(".")[0] in _STANDARD for name in names))
    return _run(program.module(), call)


def _through_onnx(model: nn.Module, call: _Call, nodes: list[int]) -> Any:
    args, keywords = cloned(call)
    # not optimized at once: that folds a batch norm into the convolution before it
    program = torch.onnx.export(
        model, args, kwargs=keywords, dynamo=True, verbose=False, optimize=False
    )
    assert program is not None  # which is for the older exporter
    nodes.append(sum(node.op_type == "BatchNormalization" for node in program.model.graph))
    program.optimize()
    return list(_run(program, call))


def _nodes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the nodes of a graph, and of the graphs inside it."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _reason(failure: BaseException) -> str:
    """Return the first line of what an error came of."""
    while (cause := failure.__cause__ or getattr(failure, "inner_exception", None)) is not None:
        failure = cause
    lines = _COLOURS.sub("", str(failure)).strip().splitlines()
    return f"{type(failure).__name__}{': ' + lines[0] if lines else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters say of torch itself, and not of the model."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)  # or else it names the operators of torchvision, if that is missing
    try:
        with warnings.catch_warnings():
            # both exporters ask torch for what it renamed
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        log.setLevel(level)
