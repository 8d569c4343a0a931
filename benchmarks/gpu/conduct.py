"""A whole bench on a device, from what was asked for to the files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from batchnorm.bench.cases import Case
from batchnorm.bench.conduct import shown_on
from batchnorm.bench.errors import BenchError
from batchnorm.bench.save import check_folder, save
from benchmarks.gpu import models
from benchmarks.gpu.cases import BATCH, CPU_BATCH, QUICK_BATCH, plan, title
from benchmarks.gpu.contenders import OURS, PEERS
from benchmarks.gpu.layers import Effort, Measured, free, measure, said
from benchmarks.gpu.machine import cache, describe_device, slug
from benchmarks.gpu.picture import png
from benchmarks.gpu.rows import LAUNCHES, Row, is_of, read
from benchmarks.models.measure import Row as ModelRow
from benchmarks.models.tables import png as models_png
from benchmarks.models.ways import COMPILED

#: How long a case is timed at least, in seconds, and in how many rounds; and the same when quick.
SECONDS, ROUNDS = 0.3, 20
QUICK_SECONDS, QUICK_ROUNDS = 0.0, 5


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
        resume: Whether layers of which the folder has rows are left as they are.
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
        stopped: Whether the time was over before all was measured.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    stopped: bool = False


class Bench:
    """A bench that is under way.

    Args:
        wanted: What is measured.
        console: Where it is shown how far it is.

    Attributes:
        outcome: What came of it so far.
    """

    def __init__(self, wanted: Wanted, console: Console) -> None:
        self.wanted, self.console = wanted, console
        self.outcome = Outcome(slug(wanted.device))
        self._end = None if wanted.minutes is None else time.monotonic() + 60 * wanted.minutes
        self._made_on = describe_device(wanted.device)
        missing = {name: PEERS[name].missing(wanted.device) for name in wanted.peers}
        self._peers = {name: PEERS[name] for name, reason in missing.items() if reason is None}
        self._left_out = {name: reason for name, reason in missing.items() if reason is not None}
        self._effort = Effort(
            QUICK_SECONDS if wanted.quick else SECONDS,
            QUICK_ROUNDS if wanted.quick else ROUNDS,
            cache(wanted.device),
        )

    def run(self) -> Outcome:
        """Measure what the figures are about, then models, then the other cases of layers.

        Raises:
            BenchError: The results cannot be written there, or ours cannot run.
        """
        wanted, outcome = self.wanted, self.outcome
        check_folder(wanted.out)
        if reason := OURS.missing(wanted.device):
            raise BenchError(reason)
        for name, reason in self._left_out.items():
            self._say(f"{name} is left out: {reason}")
        batch = (
            CPU_BATCH if wanted.device.type != "cuda" else QUICK_BATCH if wanted.quick else BATCH
        )
        first, others = plan(batch, wanted.dtypes, wanted.quick) if wanted.layers else ([], [])
        if wanted.layers and wanted.resume:
            outcome.rows = read(wanted.out / f"{outcome.name}.csv", Row)
        with shown_on(self.console) as progress:
            bar = progress.add_task("", total=len(first) + len(others) + wanted.models)
            for case in first:
                progress.update(bar, description=title(case), refresh=True)
                self._measure(case)
                progress.advance(bar)
            if wanted.models:
                progress.update(bar, description="training steps of ResNet-50", refresh=True)
                self._measure_models()
                progress.advance(bar)
            for case in others:
                progress.update(bar, description=title(case), refresh=True)
                self._measure(case)
                progress.advance(bar)
        return outcome

    def _measure(self, case: Case) -> None:
        outcome, device = self.outcome, self.wanted.device
        if any(is_of(row, case) for row in outcome.rows) or self._is_over():
            return
        try:
            found = measure(case, self._peers, device, self._effort)
        except Exception as error:  # of memory that does not suffice, say: others may fit
            found = Measured([], {"all": said(error)})
        finally:
            torch.compiler.reset()
            free(device)
        outcome.rows += found.rows
        self._note(title(case), found.failed)
        if found.rows:
            self._save(outcome.name, outcome.rows, png(outcome.rows))
            self._say(f"{title(case)}: {_in_short(found.rows)}")

    def _measure_models(self) -> None:
        wanted, outcome = self.wanted, self.outcome
        if self._is_over():
            return
        ways = [way for way in models.WAYS if way is not COMPILED or "compile" in self._peers]
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # as is usual where images have one size
        try:
            found = models.measure(
                ways, wanted.device, self._effort.rounds, wanted.quick, self._is_over
            )
        finally:
            torch.backends.cudnn.benchmark = before
        outcome.models = found.rows
        self._note("training steps of ResNet-50", found.failed)
        if found.rows:
            self._save(f"{outcome.name}-models", found.rows, models_png(found.rows))
        for row in found.rows:
            peak = "" if row.peak is None else f", peak {row.peak:.2f}"
            self._say(
                f"{row.network}, {row.way}: {row.median_ms:.1f} ms, {row.ratio:.2f}x{peak}, "
                f"losses apart {row.apart:.0e}"
            )

    def _is_over(self) -> bool:
        over = self._end is not None and time.monotonic() >= self._end
        self.outcome.stopped |= over
        return over

    def _note(self, what: str, failed: dict[str, str]) -> None:
        if failed:
            self.outcome.failed[what] = failed
        for name, reason in failed.items():
            self._say(f"{what}: {name} is not timed: {reason}")

    def _save(self, name: str, rows: Sequence[Row] | Sequence[ModelRow], picture: bytes) -> None:
        made_on: dict[str, Any] = {
            **self._made_on,
            "quick": self.wanted.quick,
            "rounds": self._effort.rounds,
            "left_out": self._left_out,
            "failed": self.outcome.failed,
        }
        if self.outcome.rows:
            speeds = [row.copy_gb_per_s for row in self.outcome.rows]
            made_on["copy_gb_per_s"] = {
                "least": min(speeds), "median": median(speeds), "most": max(speeds),
            }  # fmt: skip
        save(self.wanted.out, rows, made_on, picture, name)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _in_short(rows: Sequence[Row]) -> str:
    """Return the times of a case in one line."""
    parts = []
    for row in rows:
        share = f" ({row.of_floor:.0%} of the floor)" if row.implementation == OURS.name else ""
        parts.append(f"{row.implementation}{LAUNCHES[row.launch]} {row.median_us:.0f} us{share}")
    return "; ".join(parts)
