"""What a shift means and what to do about it, in words for who has not read of it."""

from __future__ import annotations

from batchnorm.diagnose.look import TOLERANCE
from batchnorm.diagnose.shift_report import ShiftReport, p_text

_VERDICTS = {
    "none": "No shift",
    "input": "Shift of the inputs",
    "semantic": "Shift, though not of the inputs",
}
#: What to look at first where data are not as they were.
PREPARE = (
    "Check how the data are prepared: the order of the channels, the range of the values (to 1, or "
    "to 255), what is subtracted and divided by, resizing."
)
_ADAPT = (
    "If they are right and stay like that, adapt: `batchnorm adapt MODEL DATA -o OUT` needs no "
    "labels. It helps with how inputs look, not with what they show; a few dozens of labelled "
    "examples tell whether it did."
)
_RETRAIN = "If that is not enough, train on such data."


def verdict(report: ShiftReport) -> str:
    """Return whether there is a shift, in a few words."""
    return _VERDICTS[report.kind]


def numbers(report: ShiftReport) -> str:
    """Return the numbers that the verdict is of."""
    return (
        f"score {report.score:.3g} nats ({report.noise:.2g} by chance), p "
        f"{p_text(report.p_value)}, {report.examples:,} examples"
    )


def meaning(report: ShiftReport) -> str:
    """Return what the verdict says of the data."""
    shifted = [name for name, layer in report.layers.items() if layer.shifted]
    moved = f"{len(shifted)} of {len(report.layers)} layers have shifted"
    if not report.shifted and report.score > TOLERANCE:
        return "They may differ, or this is chance: more examples would tell."
    if not report.shifted:
        but = f", though {moved}" if shifted else ""
        return f"To this model the data look like those that it was trained on{but}."
    begins = f"it begins at {shifted[0] or 'itself'}, and {moved}" if shifted else moved
    if report.kind == "input":
        return f"The inputs are not like those that the model was trained on: {begins}."
    return f"The inputs look as in training, and what they show does not: {begins}."


def advice(report: ShiftReport) -> tuple[str, ...]:
    """Return what to do, in order; nothing where there is no shift."""
    if report.kind == "input":
        return PREPARE, _ADAPT, _RETRAIN
    if report.kind == "semantic":
        return (
            "Look at some of the examples: are there classes that training did not have, or others "
            "more often?",
            "Label some, and see how many predictions are right: data may differ without harm.",
            _RETRAIN,
        )
    return ()
