"""Which GPUs the programs run on, and how they are started there."""

from __future__ import annotations

import importlib.util
import os
import re
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from importlib import import_module
from threading import Lock
from typing import Any

import torch
from torch import Tensor

#: The types that the programs take.
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The least version of Triton.
VERSION = (3, 4)
#: The least compute capability that it compiles for.
CAPABILITY = (8, 0)
#: Of a thread: with more, too few threads run at once to keep the memory busy.
REGISTERS = 128
#: Triton's interpreter takes one launch at a time.
_INTERPRETER = Lock()


@cache
def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the programs, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@cache
def missing() -> str | None:
    """Return why no program can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton, on Linux"
    if not is_interpreted() and not torch.cuda.is_available():
        return "there is no GPU here that torch can use"
    try:
        version = import_module("triton").__version__
    except Exception as error:  # of whatever it looks for when it is imported
        return f"Triton cannot be imported: {error}"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < VERSION:
        return f"Triton is of version {version}, and {VERSION[0]}.{VERSION[1]} is needed"
    if is_interpreted():
        return None
    reasons = [refusal(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@lru_cache(maxsize=64)
def refusal(index: int) -> str | None:
    """Return why a GPU cannot run the programs, or None if it can."""
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        kind = torch.cuda.get_device_properties(index).gcnArchName
        # where a wave has 64 lanes, the one that writes what others read is that which says so
        return None if kind.startswith("gfx9") else f"{name} is {kind}, and gfx9 is needed"
    found = torch.cuda.get_device_capability(index)
    if found >= CAPABILITY:
        return None
    return (
        f"{name} has compute capability {found[0]}.{found[1]}, and Triton needs "
        f"{CAPABILITY[0]}.{CAPABILITY[1]} or more"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def can_run() -> bool:
    """Return whether programs can run here, which a compiler need not look into."""
    return missing() is None


def takes(x: Tensor) -> bool:
    """Return whether there are programs for tensors like this on a GPU, whatever their strides.

    Unlike `Triton.supports`, a compiler can trace it.
    """
    return x.device.type == "cuda" and x.dtype in TYPES and can_run()


@cache
def programs() -> tuple[Any, Any, Any]:
    """Import what needs Triton, when it is first used."""
    from batchnorm.kernels.triton.programs import held, running, streaming

    return streaming, held, running


def start(program: Any, number: int, beside: Tensor, **given: Any) -> None:
    """Run a program so many times at once, where a tensor lies."""
    options: dict[str, Any] = {"enable_fp_fusion": True}  # or else each product is rounded, too
    if beside.is_cuda and torch.version.hip is None:
        options["maxnreg"] = REGISTERS
    with _on(beside):
        program[(number,)](**given, **options)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Let programs be started where a tensor lies."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _INTERPRETER
