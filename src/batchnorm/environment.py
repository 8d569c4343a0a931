"""What a measurement was made on: the hardware and the versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch

import batchnorm
from batchnorm.kernels import native


def describe() -> dict[str, str]:
    """Return the hardware and the versions that a result depends on, as text.

    Example:
        >>> list(describe())
        ['batchnorm', 'torch', 'numpy', 'python', 'system', 'cpu', 'instructions', 'threads', 'gpu']
    """
    return {
        "batchnorm": batchnorm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "instructions": next(iter(native.instructions()), "none"),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _cpu() -> str:
    """Return the processor's name, which Linux keeps in a file, and others may not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
