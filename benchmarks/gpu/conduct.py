"""A whole bench on a device, from what was asked for to the files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console

from batchnorm.bench.cases import Case
from batchnorm.bench.conduct import shown_on
from batchnorm.bench.errors import BenchError
from batchnorm.bench.save import check_folder, save
from batchnorm.kernels.triton import tuning
from benchmarks.gpu import models
from benchmarks.gpu.cases import BATCH, CPU_BATCH, QUICK_BATCH, plan, title
from benchmarks.gpu.contenders import OURS, PEERS
from benchmarks.gpu.layers import Effort, Measured, free, measure, said
from benchmarks.gpu.machine import cache, describe_device, slug
from benchmarks.gpu.picture import png
from benchmarks.gpu.rows import LAUNCHES, Row, is_of
from benchmarks.gpu.wanted import MODELS, Outcome, Wanted
from benchmarks.models.measure import Row as ModelRow
from benchmarks.models.tables import png as models_png
from benchmarks.models.ways import COMPILED, REORDERED, STOCK

#: How long a case is timed at least, in seconds, and in how many rounds; and the same when quick.
SECONDS, ROUNDS = 0.3, 20
QUICK_SECONDS, QUICK_ROUNDS = 0.0, 5
_STEPS = "training steps of ResNet-50"


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
        name = slug(wanted.device)
        self.outcome = Outcome.found(wanted.out, name) if wanted.resume else Outcome(name)
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
        with shown_on(self.console) as progress:
            bar = progress.add_task("", total=len(first) + len(others) + wanted.models)
            for case in first:
                progress.update(bar, description=title(case), refresh=True)
                self._measure(case)
                progress.advance(bar)
            if wanted.models:
                progress.update(bar, description=_STEPS, refresh=True)
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
            found = Measured([], {"all": said(error)}, {})
        finally:
            torch.compiler.reset()
            free(device)
        outcome.rows += found.rows
        self._note(outcome.failed, title(case), found.failed, "is not timed")
        self._note(outcome.noted, title(case), found.uncaptured, "is in no CUDA graph")
        if found.rows:
            self._save(outcome.name, outcome.rows, png(outcome.rows))
            self._say(f"{title(case)}: {_in_short(found.rows)}")

    def _measure_models(self) -> None:
        wanted, outcome = self.wanted, self.outcome
        ways = [way for way in models.WAYS if way is not COMPILED or "compile" in self._peers]
        known = {row.way for row in outcome.models} | outcome.failed.get(_STEPS, {}).keys()
        if known.issuperset(way.name for way in ways) or self._is_over():
            return
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # as is usual where images have one size
        try:
            found = models.measure(
                ways, wanted.device, self._effort.rounds, wanted.quick, self._is_over
            )
        except Exception as error:  # the layers are measured yet
            found = models.Outcome(failed={"all": said(error)})
        finally:
            torch.backends.cudnn.benchmark = before
        self._note(outcome.failed, _STEPS, found.failed, "is not timed")
        self._note(outcome.noted, _STEPS, found.too_large, "do not fit")
        if all(row.way in (STOCK.name, REORDERED.name) for row in found.rows):
            return  # there is nothing to compare
        outcome.models = found.rows
        self._save(outcome.name + MODELS, found.rows, models_png(found.rows))
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

    def _note(
        self, notes: dict[str, dict[str, str]], what: str, reasons: dict[str, str], that: str
    ) -> None:
        notes.pop(what, None)  # of an earlier run
        if reasons:
            notes[what] = reasons
        for name, reason in reasons.items():
            self._say(f"{what}: {name} {that}: {reason}")

    def _save(self, name: str, rows: Sequence[Row] | Sequence[ModelRow], picture: bytes) -> None:
        made_on: dict[str, Any] = {
            **self._made_on,
            "tuned": {key: [*cut] for key, cut in sorted(tuning.table(self.wanted.device).items())},
            "quick": self.wanted.quick,
            "rounds": self._effort.rounds,
            "left_out": self._left_out,
            "failed": self.outcome.failed,
            "noted": self.outcome.noted,
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
