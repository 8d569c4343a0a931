"""The doctor: what is wrong with a model's batch norm, what shows it, and what removes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.diagnose.check import (
    age,
    batches,
    channels,
    gap,
    neighbours,
    padding,
    settings,
    training,
)
from batchnorm.diagnose.check import (
    copies as copied,
)
from batchnorm.diagnose.check.finding import SEVERITIES
from batchnorm.diagnose.check.finding import Finding as Finding
from batchnorm.diagnose.check.known import Known
from batchnorm.diagnose.check.look import look
from batchnorm.diagnose.check.report import HealthReport as HealthReport
from batchnorm.models.batches import CallModel
from batchnorm.models.walk import Where, batch_norms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

_CHECKS = (
    age.find,
    settings.find,
    channels.find,
    batches.find,
    padding.find,
    neighbours.find,
    training.find,
    copied.find,
)


def check(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    copies: Mapping[str, nn.Module] | None = None,
    process_group: ProcessGroup | Literal["world"] | None = None,
    call: CallModel | None = None,
    max_batches: int | None = None,
    where: Where = None,
    progress: bool = True,
) -> HealthReport:
    """Say what is wrong with a model's batch norm: why it is worse in evaluation, and what else.

    Without data, the settings and the buffers are looked at. With data, which are best some batches
    of training as training makes them, shuffled and of its size, the model runs in evaluation, and
    each layer's running statistics are compared with what it gets; each batch runs by its own
    moments, too, and the outputs are compared. That takes one pass and the memory of an evaluation.
    Modes, buffers, hooks, gradients and the state of random numbers are left as they were.

    If the second element of a batch, or `labels` of a dict, is a tensor of one integer for each
    example, it is taken as labels: to see whether batches are sorted by class, and to compare the
    accuracy. Nothing else is done with it.

    Args:
        model: The model.
        data: The batches, any iterable; see `call`. A tensor is one batch.
        optimizer: What trains the model, to see its weight decay.
        copies: Models whose weights were made from this one's (EMA, SWA), by name.
        process_group: Processes whose statistics are compared; `"world"` for the default group.
        call: Calls the model with a batch, `call(model, batch)`. If left out: a batch is a tensor;
            a tuple or list, whose first element is the input; or a dict, passed as keywords.
        max_batches: How many batches at most.
        where: Which layers; see `freeze`.
        progress: Whether to show how far it is, on a terminal and where Rich is installed.

    Returns:
        The findings, the worst first, each with its evidence, its cause, and a line of code that
        removes it; and how far each layer is from its statistics.

    Raises:
        ValueError: There are no batches, `max_batches` is below 1, `where` names no layer, or a
            lazy layer has not seen its sizes yet.
        TypeError: A batch cannot be passed to the model, or `process_group` is no such thing.
        RuntimeError: Another process failed, or the processes' models are not alike.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model, data = nn.Sequential(nn.BatchNorm1d(3)), 3 * torch.randn(512, 3) + 5
        >>> report = bn.check(model, data.split(32))
        >>> [(finding.severity, finding.code, finding.layer) for finding in report.findings]
        [('error', 'eval_train_gap', '0'), ('error', 'never_updated', '0')]
        >>> exec(report.findings[0].fix)
        >>> bn.check(model, data.split(32))
        0 errors, 0 warnings, 0 notes in 1 batch norm, over 16 batches

    Source:
        Ioffe & Szegedy, 2015 (arXiv:1502.03167); Li et al., Understanding the Disharmony between
        Dropout and Batch Normalization by Variance Shift, 2018 (arXiv:1801.05134); Wu & Johnson,
        Rethinking "Batch" in BatchNorm, 2021 (arXiv:2105.07576).
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}: expected 1 or more")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{name!r} has no size yet, being of a lazy layer: call the model with a batch "
                "first"
            )
    layers = batch_norms(model, where)
    known = Known(model, layers, optimizer, copies or {}, process_group)
    if data is not None:
        look(known, data, call, max_batches, progress)
    report = report_of(known, _CHECKS)
    if not layers:
        report.findings.append(_none(model))
    return report


def report_of(known: Known, checks: Iterable[Callable[[Known], Iterator[Finding]]]) -> HealthReport:
    """Return what checks find, and the gap between evaluation and training that it explains.

    Args:
        known: What is known of a model.
        checks: Each yields what it finds.
    """
    findings = [finding for find in checks for finding in find(known)]
    findings = [*gap.find(known, findings), *findings]
    return HealthReport(
        sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)),
        len(known.layers),
        known.batches,
        {name: found.distance for name, found in known.gaps.items()},
        known.outputs.distance(),
        known.outputs.accuracy(),
    )


def _none(model: nn.Module) -> Finding:
    return Finding(
        "no_batch_norm",
        "note",
        "",
        f"this {type(model).__name__} has no batch norm",
        "it never had one, they were folded into other layers, or they are of a class that is "
        "neither torch's nor this package's",
        "bn.convert(model)",
    )
