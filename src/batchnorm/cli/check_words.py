"""What is wrong with a model and what to do about it, in words for who has not read of it."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.cli.shift_words import PREPARE
from batchnorm.diagnose.check.finding import Finding
from batchnorm.diagnose.check.report import HealthReport, listed

_TITLES = {
    "eval_train_gap": "The statistics do not fit what the layer gets",
    "never_updated": "The statistics were never taken from data",
    "not_converged": "The statistics are still close to where they began",
    "non_finite_statistics": "The statistics are no numbers",
    "negative_variance": "A variance is negative",
    "exploding_variance": "A variance is huge",
    "half_statistics": "The statistics are too coarse",
    "non_finite_affine": "The weights are no numbers",
    "non_finite_input": "The layer gets what is no number",
    "constant_channels": "Some channels carry nothing",
    "eps_mismatch": "eps is not that of the other layers",
    "eps_over_variance": "eps is larger than the variance",
    "unshuffled_batches": "The data are sorted",
    "padding_in_statistics": "Padding is taken for data",
    "dropout_before_norm": "The statistics are those of dropout",
    "batch_dependent_evaluation": "Answers depend on what else is in the batch",
    "not_checked": "A batch norm could not be looked at",
}
#: What is said beside the fix, or in its place.
_ADVICE = {
    "eval_train_gap": f"{PREPARE} If all that is right, take the statistics anew: `{{fix}}`.",
    "unshuffled_batches": "Shuffle them before you calibrate by them: `{fix}`.",
    "batch_dependent_evaluation": "{fix}",
    "non_finite_input": "{fix}",
}
_OF_DATA = "unshuffled_batches"
_FEW = 3  # fixes of one kind


def verdict(report: HealthReport) -> str:
    """Return whether a model is healthy, in a few words."""
    if not report.layers:
        return "Not checked"
    severities = {finding.severity for finding in report.findings}
    if "error" in severities:
        return "Not healthy"
    return "Not quite healthy" if "warning" in severities else "Healthy"


def meaning(report: HealthReport) -> str:
    """Return what the verdict stands on."""
    if not report.layers:
        return "None of the batch norms could be looked at."
    if report.ok:
        return "The batch norms fit these data."
    worst = report.findings[0]
    return f"{title(worst)}, at {worst.layer or 'the model itself'}."


def accuracy(report: HealthReport) -> str:
    """Return how many answers are right; nothing without labels."""
    if report.accuracy is None:
        return ""
    return (
        f"Of its answers {report.accuracy['evaluation']:.1%} are right, and "
        f"{report.accuracy['batch']:.1%} where each batch is normalized by its own moments."
    )


def title(finding: Finding) -> str:
    """Return what is wrong."""
    return _TITLES.get(finding.code, finding.code)


def place(group: Sequence[Finding]) -> str:
    """Return where findings of one code are, and the code."""
    code = group[0].code
    return f"{'the data' if code == _OF_DATA else listed(group)} ({code})"


def advice(group: Sequence[Finding]) -> tuple[str, ...]:
    """Return what to do about findings of one code; code stands between backquotes."""
    told = list(dict.fromkeys(map(_advice, group)))
    more = (f"and {len(told) - _FEW} more like it",) if len(told) > _FEW else ()
    return (*told[:_FEW], *more)


def _advice(finding: Finding) -> str:
    pattern = "`{fix}`" if "see there" in finding.cause else _ADVICE.get(finding.code, "`{fix}`")
    return pattern.format(fix=finding.fix)
