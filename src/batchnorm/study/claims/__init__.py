"""The claims, in the order of their numbers: a new one is a new module."""

from __future__ import annotations

import math
import pkgutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

from batchnorm.study.charts import Chart
from batchnorm.study.claims.claim import Claim as Claim
from batchnorm.study.claims.claim import Finding as Finding
from batchnorm.study.claims.claim import Judgement as Judgement
from batchnorm.study.claims.claim import Row as Row
from batchnorm.study.interval import Interval
from batchnorm.study.measures.runs import NotMeasured
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store


def all_claims() -> list[Claim]:
    """Return the claims of the notes by their numbers, then the study's own checks."""
    modules = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    claims = [module.CLAIM for module in modules if hasattr(module, "CLAIM")]
    return sorted(claims, key=lambda claim: (claim.number == 0, claim.number, claim.name))


def judge(
    claim: Claim, parts: Sequence[str], plan: Plan, store: Store, left_out: Sequence[str] = ()
) -> Judgement:
    """Judge a claim by the outcomes that it asked for.

    Args:
        claim: The claim.
        parts: The parts that were done.
        plan: What the runs were made from.
        store: Where the outcomes are.
        left_out: The parts that there was no time for.

    Returns:
        What came of it. Where nothing can be measured, or what was found cannot be told, the
        finding says so, and no pictures are there where drawing them fails: the study goes on.
    """
    findings = [_finding(claim, part, plan, store) for part in parts]
    drawn = [finding.part for finding in findings if finding.rows]
    return Judgement(claim, findings, _charts(claim, drawn, plan, store), left_out)


def _finding(claim: Claim, part: str, plan: Plan, store: Store) -> Finding:
    try:
        return _checked(claim.measure(plan, part, store))
    except NotMeasured as reason:
        return Finding(part, str(reason))
    except Exception as error:  # an extension's claim stops no other
        return Finding(part, f"Measuring failed: {type(error).__name__}: {error}.")


def _checked(found: Finding) -> Finding:
    """Return a finding that every report can tell, whatever an extension has put into it."""
    # A comparison of NumPy's numbers is no bool, and no JSON.
    checks = {what: bool(held) for what, held in found.checks.items()}
    texts = [found.part, found.sentence, found.effect, found.without, found.with_, *checks]
    rows = []
    for row in found.rows:
        if not isinstance(row.effect, Interval | None):
            raise TypeError(f"the effect {row.effect!r:.60} is no Interval")
        if not all(map(math.isfinite, row.values)):
            raise ValueError(f"{row.measure} of {row.condition} is not finite")
        texts += [row.condition, row.measure]
        if row.effect:
            texts += [row.effect.unit, str(row.effect)]
        rows.append(replace(row, values=[float(value) for value in row.values]))
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r:.60} is no text")
    return replace(found, checks=checks, rows=rows)


def _charts(claim: Claim, parts: Sequence[str], plan: Plan, store: Store) -> Sequence[Chart]:
    if not parts:
        return []
    try:
        return list(claim.charts(plan, parts, store))
    except Exception as error:  # likewise
        warnings.warn(f"the pictures of {claim.title!r} failed: {error!r}", stacklevel=2)
        return []
