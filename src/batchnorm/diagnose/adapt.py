"""Adaptation: running statistics for other data, without labels and without training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.accuracy import Gain, examples_in, gain, labels_in, logits_of
from batchnorm.diagnose.entropy import Sharpened, sharpen
from batchnorm.diagnose.evidence import Evidence
from batchnorm.diagnose.look import Look, check_settings, evidence_of, known
from batchnorm.diagnose.observe import in_evaluation, observed
from batchnorm.diagnose.shift_report import ShiftReport
from batchnorm.models.batches import CallModel, call_with, limited, progress_bar
from batchnorm.models.calibrate import calibrate
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms
from batchnorm.moments import statistics_dtype

#: How many examples the source counts for where one batch is all that is known of the target.
ONE_BATCH = 16.0


@dataclass(repr=False)
class AdaptReport(Report):
    """What adaptation did.

    Attributes:
        verb: What was done, as a participle.
        done: The names of the layers that were adapted, in the order of the model.
        left: The names of the others, each with the reason.
        examples: How many examples of the target there were.
        weights: The weight of the target in the statistics of each layer, from 0 to 1.
        before: The shift between the source and the target.
        after: The shift that is left.
        gain: The accuracy before and after, if the batches had labels.
        sharpened: What minimizing the entropy did, if that was asked for.

    Example:
        >>> import batchnorm as bn, torch
        >>> report = bn.adapt(bn.BatchNorm(3), [torch.randn(100, 3) + 1])
        >>> report.examples, report.before.shifted, report.after.shifted
        (100, True, False)
    """

    verb: str = "adapted"
    examples: int = 0
    weights: dict[str, float] = field(default_factory=dict)
    before: ShiftReport | None = None
    after: ShiftReport | None = None
    gain: Gain | None = None
    sharpened: Sharpened | None = None
    _undo: Callable[[], None] | None = field(default=None, init=False)

    def undo(self) -> None:
        """Set all that was changed to what it was, bit for bit.

        Example:
            >>> import batchnorm as bn, torch
            >>> layer = bn.BatchNorm(3)
            >>> report = bn.adapt(layer, [torch.randn(100, 3) + 1])
            >>> report.undo()
            >>> layer.running_mean
            tensor([0., 0., 0.])
        """
        if self._undo is not None:
            self._undo()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data.

        Example:
            >>> import batchnorm as bn, torch
            >>> bn.adapt(bn.BatchNorm(3), [torch.randn(100, 3) + 1]).to_dict()["examples"]
            100
        """
        shifts = {
            name: shift.to_dict() if shift is not None else None
            for name, shift in (("before", self.before), ("after", self.after))
        }
        return {
            "adapted": self.done,
            "left": self.left,
            "examples": self.examples,
            "weights": self.weights,
            **shifts,
            "gain": None if self.gain is None else self.gain._asdict(),
            "sharpened": None if self.sharpened is None else self.sharpened._asdict(),
        }

    def _details(self) -> list[str]:
        lines = []
        if self.weights:
            low, high = min(self.weights.values()), max(self.weights.values())
            lines.append(f"  {self.examples:,} examples count for {low:.0%} to {high:.0%}")
        if self.before is not None and self.after is not None:
            lines.append(
                f"  shift {self.before.score:.3g} -> {self.after.score:.3g} nats"
                + ("" if self.before.shifted else ": there was none to adapt to")
            )
        if self.sharpened is not None:
            lines.append(f"  {self.sharpened}")
        if self.gain is not None:
            lines.append(f"  {self.gain}")
            if self.gain.is_worse:
                lines.append("  report.undo() takes it back")
        return lines


def adapt(
    model: nn.Module,
    data: Iterable[Any],
    *,
    prior: float | None = None,
    entropy_steps: int = 0,
    learning_rate: float = 1e-3,
    call: CallModel | None = None,
    max_batches: int | None = None,
    where: Where = None,
    train_batch_size: int = 32,
    progress: bool = True,
) -> AdaptReport:
    """Blend the running statistics with those of other data, the target, without labels.

        mean = (1 - w) mean_source + w mean_target        w = n / (N + n)
        var  = (1 - w) var_source + w var_target

    for n examples of the target, where the source counts for N, the prior. The moments of the
    target are those that `calibrate` finds: each layer is normalized by its batch, so what was
    shifted before it is mended. A N given as `prior` is that of all layers. By default it is
    chosen for each by the target's size and shift: w = score / (score + noise), with `score` and
    `noise` as in `measure_shift`, the weight with the least expected error (James & Stein). Few
    examples that are off by chance move little; many, or far ones, almost all.

    Then, if asked for, gamma and beta are trained to minimize the entropy of the predictions, one
    step a batch, with a guard against collapse: if the predicted classes grow fewer, the steps are
    taken back, and the report says so.

    Where batches are (inputs, labels), or have "labels", the report has the accuracy before and
    after, and says if it got worse; labels are used for nothing else. On data that come in the
    same order each time the difference is known better than on shuffled ones.
    Whatever happens, nothing but running statistics, and gamma and beta, changes; an error changes
    nothing; `report.undo()` takes all back.

    Args:
        model: The model, changed in place.
        data: The batches of the target; gone through several times. The larger a batch, the better
            its moments: dozens of examples, at least.
        prior: How many examples the source counts for; 0 for the target alone.
        entropy_steps: How many batches gamma and beta are trained with.
        learning_rate: Of these steps, plain gradient descent.
        call: Calls the model with a batch; see `calibrate`.
        max_batches: How many batches at most.
        where: Which layers; see `freeze`.
        train_batch_size: See `measure_shift`.
        progress: Whether to show how far it is, on a terminal and where Rich is installed.

    Returns:
        What was adapted, by how much, the shift before and after, and what it did to the accuracy.

    Raises:
        ValueError: A number is negative; the model has no running statistics, or there are fewer
            than two examples; `entropy_steps` are asked for, and the model returns no logits.
        TypeError: The data can be gone through only once, or a batch is of no known kind.
        RuntimeError: A layer is in a transaction.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
        >>> _ = bn.calibrate(model, [torch.randn(1000, 3)])
        >>> report = bn.adapt(model, [torch.randn(500, 3) + 2])
        >>> report.before.shifted, report.after.shifted
        (True, False)

    Source:
        Schneider et al., 2020 (arXiv:2006.16971), and Nado et al., 2020 (arXiv:2006.10963), for the
        statistics; Wang et al., Tent, 2021 (arXiv:2006.10726), for the entropy; James & Stein,
        Estimation with quadratic loss, 1961.
    """
    for what, number in (
        ("prior", prior or 0),
        ("entropy_steps", entropy_steps),
        ("learning_rate", learning_rate),
    ):
        if not number >= 0:
            raise ValueError(f"{what} is {number}: expected 0 or more")
    if iter(data) is data:
        raise TypeError(
            "adapt goes through the data several times, but they can be gone through only once, "
            f"being a {type(data).__name__}: give a list or a loader"
        )
    check_settings(max_batches, train_batch_size)
    layers = batch_norms(model, where)
    kept = _Kept(layers)

    def seen() -> tuple[ShiftReport, tuple[Tensor, Tensor] | None]:
        return _evaluate(model, data, layers, call, max_batches, train_batch_size)

    with progress_bar("adapting", data, max_batches, 1, progress) as advance:
        try:
            before, right = seen()
            report = AdaptReport(examples=before.examples, before=before)
            report._undo = kept.restore
            _blend(model, data, layers, prior, call, max_batches, where, report, advance)
            if entropy_steps:
                report.sharpened = sharpen(
                    model, data, layers, entropy_steps, learning_rate, call, max_batches
                )
            report.after, now_right = seen()
        except BaseException:
            kept.restore()
            raise
    if right is not None and now_right is not None:
        report.gain = gain(right[0], now_right[0], paired=torch.equal(right[1], now_right[1]))
    return report


def _evaluate(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, _BatchNorm],
    call: CallModel | None,
    max_batches: int | None,
    train_batch_size: int,
) -> tuple[ShiftReport, tuple[Tensor, Tensor] | None]:
    """Return the shift, and if all batches have labels, which are right, and the labels."""
    evidence, left = known(model, layers, train_batch_size)
    look, labelled = Look(evidence), True
    right: list[Tensor] = []
    known_labels: list[Tensor] = []
    with in_evaluation(model), observed({name: layers[name] for name in evidence}, look):
        for batch in limited(data, max_batches):
            look.begin(examples_in(batch))
            logits, labels = logits_of(call_with(model, batch, call)), labels_in(batch)
            if logits is None or labels is None or len(labels) != len(logits):
                labelled = False
            elif labelled:
                known_labels.append(labels.cpu())
                right.append(logits.argmax(1).cpu() == labels.cpu())
    report = look.report()
    report.left.update(left)
    if not labelled or not right:
        return report, None
    return report, (torch.cat(right), torch.cat(known_labels))


def _blend(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, _BatchNorm],
    prior: float | None,
    call: CallModel | None,
    max_batches: int | None,
    where: Where,
    report: AdaptReport,
    advance: Callable[[], None],
) -> None:
    """Set the running statistics to the blend of what they are and what the data have."""
    sources = {
        name: (mean.clone(), var.clone(), count.clone() if count is not None else None)
        for name, layer in layers.items()
        for mean, var, count in [(layer.running_mean, layer.running_var, layer.num_batches_tracked)]
        if mean is not None and var is not None
    }
    evidence = {  # the source is what there is to go by: it has no noise
        name: Evidence(*sources[name][:2], layers[name].eps) for name in evidence_of(layers, 1)[0]
    }
    look = Look(evidence)

    def watched(module: nn.Module, batch: Any) -> Any:
        look.begin(examples_in(batch))
        found = call_with(module, batch, call)
        advance()
        return found

    with observed({name: layers[name] for name in evidence}, look):
        done = calibrate(
            model, data, call=watched, max_batches=max_batches, where=where, progress=False
        )
    report.done, report.left = done.done, done.left
    with torch.no_grad():
        for name in done.done:
            layer = layers[name]
            seen = evidence.get(name)  # there is none beside statistics that were not finite
            weight = 1.0 if seen is None else weight_of(seen, prior)
            for target, source in zip(
                (layer.get_buffer("running_mean"), layer.get_buffer("running_var")),
                sources[name][:2],
                strict=True,
            ):
                target.copy_(blend(source, target, weight))
            tracked = sources[name][2]
            if tracked is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(tracked)  # no step of training was taken
            report.weights[name] = weight


def blend(source: Tensor, target: Tensor, weight: float) -> Tensor:
    """Return the mean of two statistics of a layer, of which the second has that weight."""
    wide = source.to(statistics_dtype(source.device))
    if weight == 1:  # whatever the first one was
        return target.to(wide.dtype)
    return wide + weight * (target.to(wide.dtype) - wide)


def weight_of(evidence: Evidence, prior: float | None) -> float:
    """Return how much the target counts.

    Args:
        evidence: What the target says of a layer, beside a source without noise.
        prior: How many examples the source counts for; None to see by the evidence.
    """
    n = evidence.count
    if prior is not None:
        return n / (prior + n) if n else 0.0
    if n < 2:
        return n / (ONE_BATCH + n)
    compared = evidence.compare()
    noise = float(compared.noise.mean())
    score = max(float(compared.distance.mean()) - noise, 0.0)
    return score / (score + noise) if score > 0 else 0.0


class _Kept:
    """The statistics and the affine part of layers, to be given back bit for bit.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = dict(layers)
        self._state = {name: copy.deepcopy(_state(layer)) for name, layer in layers.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Set them to what they were; in the type and on the device where they now are."""
        for name, layer in self._layers.items():
            for own, tensor in _state(layer).items():
                tensor.copy_(self._state[name][own])


def _state(layer: _BatchNorm) -> dict[str, Tensor]:
    tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return {name: tensor.detach() for name, tensor in tensors}
