"""What a measurement on a GPU was made on."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from typing import Any

import torch

from batchnorm.environment import describe


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return the device, the driver and the versions that a result depends on.

    Args:
        device: What is measured.
    """
    found: dict[str, Any] = {
        **describe(),
        "device": device.type,
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version() or "none",  # type: ignore[no-untyped-call]
        "triton": _version("triton"),
        "jax": _version("jax"),
        "transformers": _version("transformers"),
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _driver(),
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(cache(device) / 2**20, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def cache(device: torch.device) -> int:
    """Return the bytes of the last cache of a GPU; 0 of a CPU, on which inputs take no turns."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.L2_cache_size)


def slug(device: torch.device) -> str:
    """Return how the files of a device are called."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """Return the version of the driver, which the tool of NVIDIA tells, or that there is none."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else "unknown"
