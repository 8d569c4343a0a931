"""Which cut of a batch was the fastest on this GPU: found when asked for, and kept in a file.

There is a file for each GPU and version of Triton.

With `BATCHNORM_TUNE=1` in the environment, the first call of each shape times all candidates. What
was found is used in later runs as well, with the variable or without, so that the same batch gives
the same bits in all of them. Without a file, every batch is cut as `plan` reckons.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from statistics import median

import torch

from batchnorm.kernels.triton.plan import Cut

#: Whether to time candidates: 1 for yes.
VARIABLE = "BATCHNORM_TUNE"
#: The folder of the files, one for each GPU.
FOLDER = "BATCHNORM_CACHE"
_ROUNDS, _WARMUP = 20, 3


def folder() -> Path:
    """Return the folder of what was tuned."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "batchnorm"


@lru_cache(maxsize=16)
def _file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    whole = f"triton-{import_module('triton').__version__}-{name}.json"
    return folder() / whole.replace(" ", "-").replace("/", "-")


@lru_cache(maxsize=16)
def table(device: torch.device) -> dict[str, Cut]:
    """Return what was tuned on a device; a file that cannot be read is as good as none."""
    try:
        read = json.loads(_file(device).read_text(encoding="utf-8"))
        return {
            str(key): Cut(int(rows), int(columns), int(programs), int(warps), bool(held))
            for key, (rows, columns, programs, warps, held) in read.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, ImportError):
        return {}


def forget() -> None:
    """Read the files again when they are next needed."""
    _file.cache_clear()
    table.cache_clear()


def kept(key: str, device: torch.device) -> Cut | None:
    """Return the cut that was found for a batch, or None."""
    return table(device).get(key)


def is_asked_for() -> bool:
    """Return whether candidates are to be timed."""
    return os.environ.get(VARIABLE) == "1"


def fastest(
    key: str, device: torch.device, candidates: Sequence[Cut], run: Callable[[Cut], object]
) -> Cut:
    """Time all candidates, keep the fastest in the file, and return it.

    A candidate that does not run (it needs more registers than there are, say) is passed over.

    Args:
        key: Of the batch.
        device: Where it lies.
        candidates: The cuts; the first is what is reckoned.
        run: Does the work by a cut; what it writes may be written again.
    """
    times: dict[Cut, float] = {}
    for cut in dict.fromkeys(candidates):
        try:
            times[cut] = _time(lambda cut=cut: run(cut), device)  # type: ignore[misc]
        except Exception:
            if cut == candidates[0]:
                raise
    best = min(times, key=lambda cut: times[cut])
    table(device)[key] = best
    _save(device)
    return best


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes on the device, in milliseconds."""
    for _ in range(_WARMUP):
        call()
    if device.type != "cuda":
        return 0.0  # interpreted: nothing is to be gained
    times = []
    for _ in range(_ROUNDS):
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(median(times))


def _save(device: torch.device) -> None:
    """Write the file, whole, with what other processes may have added to it in the meantime."""
    path, found = _file(device), dict(table(device))
    table.cache_clear()
    merged = {**table(device), **found}
    table(device).update(found)
    text = json.dumps({key: list(merged[key]) for key in sorted(merged)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text + "\n")
        Path(file.name).replace(path)
    except OSError:  # it is then found again in the next process
        return
