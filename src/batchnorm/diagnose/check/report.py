"""What `check` says of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING, Any

from batchnorm.diagnose.check.finding import SEVERITIES, Finding
from batchnorm.diagnose.check.gap import OPEN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 3  # fixes that are shown of one code
_ROWS, _LETTERS = 30, 36  # names in a figure, and letters of one
_NAMES = 56  # letters of a list of layers


@dataclass(repr=False)
class HealthReport:
    """What was found, the worst first.

    Attributes:
        findings: The faults.
        layers: How many batch norms were looked at.
        batches: How many batches of data.
        gaps: For each layer that the data reached, in the order of the calls, how far what it gets
            in evaluation is from its running statistics, in standard deviations: the root of the
            mean over channels of d^2 + (s - 1)^2, with the mean d and the standard deviation s of
            what it normalizes to.
        outputs: How far the model's outputs by the batches' moments are from those in evaluation,
            relative to their standard deviation; None if that could not be compared.
        accuracy: The accuracy in `"evaluation"` and by the `"batch"`'s moments, if there were
            labels.

    Example:
        >>> import batchnorm as bn
        >>> from torch import nn
        >>> bn.check(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=0.99)))
        0 errors, 1 warning, 0 notes in 2 batch norms, without data
        warning momentum_convention at 1
          found  momentum is 0.99: the last batch counts 99 % of the running statistics
          why    Keras and Flax mean by it the share that is kept, PyTorch that of the
                 new batch
          fix    model[1].momentum = 0.01
    """

    findings: list[Finding]
    layers: int
    batches: int = 0
    gaps: dict[str, float] = field(default_factory=dict)
    outputs: float | None = None
    accuracy: dict[str, float] | None = None

    @property
    def ok(self) -> bool:
        """Return whether there is no error and no warning.

        Example:
            >>> import batchnorm as bn
            >>> bn.check(bn.BatchNorm(3)).ok
            True
        """
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def counts(self) -> str:
        """Return how many findings there are, in how much.

        Example:
            >>> import batchnorm as bn
            >>> bn.check(bn.BatchNorm(3)).counts
            '0 errors, 0 warnings, 0 notes in 1 batch norm, without data'
        """
        counts = [sum(f.severity == s for f in self.findings) for s in SEVERITIES]
        found = ", ".join(_plural(n, s) for n, s in zip(counts, SEVERITIES, strict=True))
        data = f"over {_plural(self.batches, 'batch', 'es')}" if self.batches else "without data"
        return f"{found} in {_plural(self.layers, 'batch norm')}, {data}"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data.

        Example:
            >>> import batchnorm as bn
            >>> bn.check(bn.BatchNorm(3)).to_dict()["ok"]
            True
        """
        return {"ok": self.ok, **asdict(self)}

    def plot(self) -> Figure:
        """Return a figure of the gap between evaluation and training by depth, by Matplotlib.

        Layers with an error or a warning are drawn in red; dashed is where a gap is open.

        Raises:
            ValueError: There were no data.

        Example:
            >>> import batchnorm as bn, torch
            >>> figure = bn.check(bn.BatchNorm(3), [torch.randn(64, 3)] * 4).plot()
            >>> figure.axes[0].get_xlabel()
            'gap, standard deviations'
        """
        if not self.gaps:
            raise ValueError(
                "there is no gap to draw: give data, bn.check(model, data), that reach a batch "
                "norm with running statistics"
            )
        from matplotlib.figure import Figure

        faults = {finding.layer for finding in self.findings if finding.severity != "note"}
        names, places = list(self.gaps), range(len(self.gaps))
        most = max([1.0, *(gap for gap in self.gaps.values() if math.isfinite(gap))])
        figure = Figure(figsize=(7.2, 1.6 + 0.16 * min(len(names), _ROWS)), layout="constrained")
        axes = figure.subplots()
        axes.barh(
            places,
            [min(gap, 1.1 * most) for gap in self.gaps.values()],
            color=["#d1242f" if name in faults else "#1f6feb" for name in names],
        )
        axes.axvline(OPEN, color="#d29922", linestyle="--", linewidth=1)
        step = math.ceil(len(names) / _ROWS)
        axes.set_yticks(list(places)[::step], [_short(n) for n in names[::step]], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("gap, standard deviations")
        axes.set_title("evaluation against training, from the inputs down", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield fill(self.counts, 80)
        if self.accuracy is not None:
            by = self.accuracy
            yield (
                f"accuracy {by['evaluation']:.3f} in evaluation, {by['batch']:.3f} by the "
                "batches' own moments"
            )
        for some in grouped(self.findings):
            title = f"{some[0].severity} {some[0].code}"
            yield _filled(f"{title} at {listed(some)}", "  ")
            yield _entry("found", some[0].evidence)
            yield _entry("why", some[0].cause)
            fixes = list(dict.fromkeys(finding.fix for finding in some))
            for fix in fixes[:_FEW]:
                yield _entry("fix", fix)
            if len(fixes) > _FEW:
                yield _entry("", f"and {len(fixes) - _FEW} more like it, in .findings")


def _short(name: str) -> str:
    short = name if len(name) <= _LETTERS else "..." + name[-_LETTERS:]
    return short.replace("$", r"\$")  # which would begin mathematics


def _plural(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{ending if count != 1 else ''}"


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Return findings in groups of one severity and code, in their order."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code), []).append(finding)
    return list(groups.values())


def listed(findings: Iterable[Finding]) -> str:
    """Return the names of the layers, or how many there are."""
    shown = [finding.layer or "itself" for finding in findings]
    listed = ", ".join(shown)
    if len(listed) <= _NAMES or len(shown) == 1:
        return listed
    return f"{shown[0]} ... {shown[-1]} ({len(shown)})"


def _entry(title: str, text: str) -> str:
    return _filled(f"  {title:6} {text}", " " * 9)


def _filled(text: str, indent: str) -> str:
    return fill(text, 80, subsequent_indent=indent, break_on_hyphens=False)
