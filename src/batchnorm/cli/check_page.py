"""A page that says what is wrong with a model, and what to do, to who has read nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchnorm.cli import check_words as words
from batchnorm.cli.page import code, framed, picture, text
from batchnorm.diagnose.check.finding import Finding
from batchnorm.diagnose.check.gap import OPEN
from batchnorm.diagnose.check.report import HealthReport, grouped
from batchnorm.study.errors import printable
from batchnorm.study.markup import table

_READING = (
    "Each batch norm of the model has kept the mean and the variance of what it got in training, "
    "and normalizes by them. Here the data went through the model twice: once so, and once with "
    "each batch normalized by its own moments, as in training. Where the two are not alike, the "
    "model is worse than it was in training.",
    "How far a layer is off is the root of the mean over its channels of d² + (s - 1)², where d is "
    "the mean and s the standard deviation of what it normalizes to; they would be 0 and 1. Over "
    f"{OPEN} is far. What lies behind the first layer that is far off is off as a consequence.",
    "An error is what makes answers wrong, a warning what is likely to make them worse, and a note "
    "what is good to know. A line of Python is for the module that was exported.",
)


def page(report: HealthReport, model: object, data: str) -> str:
    """Return the page: whole, without scripts, and loading nothing.

    Args:
        report: What was found.
        model: What is called the model.
        data: What the data are called.
    """
    found = "".join(_of_group(group) for group in grouped(report.findings))
    main = f"""{f"<section><h2>What was found</h2>{found}</section>" if found else ""}
{_where(report) if report.gaps else ""}"""
    lead = " ".join(filter(None, (words.meaning(report), words.accuracy(report))))
    return framed(
        words.verdict(report), lead, report.counts, main, _READING, model=model, data=data
    )


def _of_group(group: Sequence[Finding]) -> str:
    first = group[0]
    entries = [("where", text(words.place(group))), ("seen", text(first.evidence))]
    entries.append(("why", text(first.cause)))
    entries += [("to do", code(step)) for step in words.advice(group)]
    told = "".join(f"<dt>{name}</dt><dd>{entry}</dd>" for name, entry in entries)
    return f"<h3>{first.severity.title()}: {text(words.title(first))}</h3><dl>{told}</dl>"


def _where(report: HealthReport) -> str:
    drawn = replace(
        report,
        gaps={printable(name): gap for name, gap in report.gaps.items()},
        findings=[replace(f, layer=printable(f.layer)) for f in report.findings],
    )
    gaps = table(
        ("batch norm", "off by", ""),
        (
            (text(name or "itself"), f"{gap:.3g}", "far" if gap > OPEN else "")
            for name, gap in report.gaps.items()
        ),
    )
    return f"""<section>
<h2>Where it is</h2>
<figure>{picture(drawn.plot, "how far each layer is off")}
<figcaption>How far what each layer gets is from its statistics, from the inputs down, in standard
deviations. Red: a layer with an error or a warning.</figcaption></figure>
{gaps}
</section>"""
