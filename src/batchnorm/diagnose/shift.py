"""Covariate shift: how far data are from those that a network's running statistics remember."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from batchnorm.diagnose.accuracy import examples_in
from batchnorm.diagnose.look import ALPHA, TOLERANCE, Look, check_settings, known
from batchnorm.diagnose.observe import in_evaluation, observed
from batchnorm.diagnose.shift_report import ShiftReport
from batchnorm.models.batches import CallModel, call_with, limited, progress_bar
from batchnorm.models.walk import Where, batch_norms


def measure_shift(
    model: nn.Module,
    data: Iterable[Any],
    *,
    call: CallModel | None = None,
    max_batches: int | None = None,
    where: Where = None,
    train_batch_size: int = 32,
    alpha: float = ALPHA,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> ShiftReport:
    """Return how far data are from those that a network was trained on, by its batch norms.

    Each layer has kept the mean and the variance of its inputs in training, channel by channel:
    nothing else of the training data is needed, and no labels. For each channel the distance is

        J = 1/2 [(v + d^2) / w + (w + d^2) / v] - 1        in nats, 0 if nothing moved

    the symmetric Kullback-Leibler divergence of normal distributions with variances v, w, both with
    eps, whose means are d apart. A sample of n examples is off by chance: what that makes of J, to
    first order Var(mean) / v + Var(variance) / (2 v^2), is taken off. It is estimated from how the
    examples differ, as the positions of one are alike, and so is the noise of the running average
    itself. The score of a layer is the mean over its channels, and that of the model over its
    layers.

    Whether it is a shift is tested against what the same examples give by chance, in replicates
    which keep what channels and layers have in common: 5% of samples of the training distribution
    are taken for shifted at the default level, be they 32 or 10,000 examples. Layers are corrected
    for their number by Holm's method, channels by that of Benjamini & Hochberg.

    The data are gone through once, in evaluation and without gradients; the memory that it takes
    does not depend on how many there are. The model is left as it was.

    Args:
        model: The model, with batch norms of `torch.nn` or of ours.
        data: The batches, any iterable; see `calibrate`. A few dozens of examples say something.
        call: Calls the model with a batch; see `calibrate`.
        max_batches: How many batches at most.
        where: Which layers; see `freeze`.
        train_batch_size: How many examples a batch of the training run had: by that and the
            momentum the noise of the running statistics is known.
        alpha: The level of the tests: so many of 1 are false alarms.
        tolerance: A score that is no shift, however sure it is: by default that of channels whose
            means have all moved by a tenth of a standard deviation.
        progress: Whether to show how far it is, on a terminal and where Rich is installed.

    Returns:
        The scores of model, layers and channels, and whether they are a shift.

    Raises:
        ValueError: The model has no batch norm with running statistics, or none that saw two
            finite examples; or `where` names none.
        TypeError: A batch is of no known kind.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)).eval()
        >>> data = torch.randn(1000, 3)
        >>> _ = bn.calibrate(model, [data])
        >>> bn.measure_shift(model, [torch.randn(100, 3)]).shifted
        False
        >>> bn.measure_shift(model, [torch.randn(100, 3) + 1]).shifted
        True

    Source:
        Kullback & Leibler, On information and sufficiency, 1951. Schneider et al., Improving
        robustness against common corruptions by covariate shift adaptation, 2020
        (arXiv:2006.16971), measure shift by what batch norms have kept.
    """
    check_settings(max_batches, train_batch_size)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: expected a number between 0 and 1")
    layers = batch_norms(model, where)
    evidence, left = known(model, layers, train_batch_size)
    look = Look(evidence)
    with (
        in_evaluation(model),
        observed({name: layers[name] for name in evidence}, look),
        progress_bar("shift", data, max_batches, 1, progress) as advance,
    ):
        for batch in limited(data, max_batches):
            look.begin(examples_in(batch))
            call_with(model, batch, call)
            advance()
    report = look.report(alpha, tolerance)
    report.left.update(left)
    return report
