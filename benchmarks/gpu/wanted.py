"""What is asked for, and what came of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.contenders import PEERS
from benchmarks.gpu.rows import Row, read
from benchmarks.models.measure import Row as ModelRow

#: How the files of models end, before their ending.
MODELS = "-models"


@dataclass(frozen=True)
class Wanted:
    """What a user asks for.

    Attributes:
        device: Where.
        out: The folder of the results.
        dtypes: The types of the layers; the figures are about the first.
        peers: Names of `PEERS`.
        layers: Whether layers are measured.
        models: Whether whole models are.
        quick: Whether a first impression will do.
        minutes: After how long no case is begun any more.
        resume: Whether that of which the folder has rows is left as it is.
    """

    device: torch.device
    out: Path
    dtypes: tuple[str, ...]
    peers: tuple[str, ...] = tuple(PEERS)
    layers: bool = True
    models: bool = True
    quick: bool = False
    minutes: float | None = None
    resume: bool = False


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        name: What the files are called, but for their ending.
        rows: Those of the layers.
        models: Those of the models.
        failed: For each case who was not timed, and why.
        noted: For each case what else could not be done, and why.
        stopped: Whether the time was over before all was measured.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    noted: dict[str, dict[str, str]] = field(default_factory=dict)
    stopped: bool = False

    @classmethod
    def found(cls, folder: Path, name: str) -> Outcome:
        """Return what earlier runs have left in a folder.

        Args:
            folder: The folder of the results.
            name: What the files are called.
        """
        path = folder / f"{name}.json"
        made_on = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return cls(
            name,
            read(folder / f"{name}.csv", Row),
            read(folder / f"{name}{MODELS}.csv", ModelRow),
            made_on.get("failed", {}),
            made_on.get("noted", {}),
        )
