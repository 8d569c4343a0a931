"""Running statistics from several places as one: over processes, over state dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import Synchronized, agree, synchronized
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(repr=False)
class ReduceReport(Report):
    """Which layers have the same statistics on all processes now.

    Attributes:
        spread: By how much the processes differed before: the largest distance between the mean
            of a process and that of all, in standard deviations of all.
    """

    spread: float = 0.0

    verb: str = "reduced"


def reduce_statistics(
    model: nn.Module,
    process_group: ProcessGroup | Literal["world"] = "world",
    *,
    where: Where = None,
) -> ReduceReport:
    """Set the running statistics of all processes to those of the mixture of all.

        mean = sum w_p mean_p        var = sum w_p (var_p + (mean_p - mean)^2)

    where w_p is the share of process p in the batches that were tracked; the second term, what lies
    between the processes, is what averaging the variances loses. Processes that saw no batch count
    nothing; where batches are not counted, or none were, all count the same. All layers go in one
    collective, after one that makes sure that the models are alike.

    Args:
        model: The model, changed in place.
        process_group: The processes; the default group if left out.
        where: Which layers; see `freeze`.

    Returns:
        Which layers were reduced, which were left, and how far the processes were apart.

    Raises:
        ValueError: `where` names no layer.
        TypeError: `process_group` is no such thing.
        RuntimeError: The processes' models are not alike, or another process failed.

    Example:
        >>> import batchnorm as bn
        >>> bn.reduce_statistics(bn.BatchNorm(3))  # alone, there is nothing to reduce
        0 reduced
          left itself: there is no other process
    """
    report, layers = ReduceReport(), _tracking(model, where)
    pool = synchronized(process_group)
    if pool is None:
        report.left = dict.fromkeys(layers, "there is no other process")
        return report
    for name, (layer, of_all) in _gathered(layers, pool).items():
        weights, means, variances = of_all  # (P, 1), (P, C), (P, C)
        mixture = Moments(weights, means, variances * weights).merged()
        mean, var = mixture.mean, mixture.var()
        apart = ((means - mean).abs() / var.sqrt()).where(weights > 0, 0)
        report.spread = max(report.spread, float(apart.nan_to_num(0).max()))
        _statistics(layer)[0].copy_(mean)
        _statistics(layer)[1].copy_(var)
        report.done.append(name)
    return report


def assert_statistics_agree(
    model: nn.Module,
    process_group: ProcessGroup | Literal["world"] = "world",
    *,
    where: Where = None,
) -> None:
    """Raise RuntimeError unless the running statistics are the same, bit for bit, on all processes.

    Args:
        model: The model.
        process_group: The processes; the default group if left out.
        where: Which layers; see `freeze`.

    Raises:
        RuntimeError: They differ; the error, on all processes, names the layer and the ranks.
        ValueError: `where` names no layer.
        TypeError: `process_group` is no such thing.

    Example:
        >>> import batchnorm as bn
        >>> bn.assert_statistics_agree(bn.BatchNorm(3))
    """
    layers, pool = _tracking(model, where), synchronized(process_group)
    if pool is None:
        return
    for name, (_, (_, means, variances)) in _gathered(layers, pool).items():
        for kind, of_all in (("mean", means), ("variance", variances)):
            other = (of_all != of_all[:1]).any(1) & ~(of_all.isnan() & of_all[:1].isnan()).all(1)
            ranks = other.nonzero().flatten().tolist()
            if ranks:
                raise RuntimeError(
                    f"the running {kind} of {name!r} on rank{'s' * (len(ranks) > 1)} "
                    f"{', '.join(map(str, ranks))} is not that of rank 0: synchronize the layers "
                    "(bn.synchronize), or reduce their statistics (bn.reduce_statistics) before "
                    "you evaluate or save"
                )


def merge_statistics(
    parts: Iterable[tuple[Mapping[str, Tensor], float]],
) -> dict[str, Tensor]:
    """Return the running statistics of several state dicts together, as in federated training.

        mean = sum n_k mean_k / n
        var = sum ((n_k - 1) var_k + n_k (mean_k - mean)^2) / (n - 1)

    This is exact where var_k is the unbiased variance of n_k values, as `calibrate` gives it.
    Averaging the variances would lose what lies between the parts.

    Args:
        parts: Pairs of a state dict and n, how many values a channel its statistics stand for:
            examples, and examples times pixels for images. What has an n of 0 is left out.

    Returns:
        Every `running_mean`, `running_var` and `num_batches_tracked`, of the types they have in the
        first state dict, the last summed up; ready for `load_state_dict(..., strict=False)`.

    Raises:
        ValueError: There are no parts, an n is below 2, or the state dicts are not of one model.

    Example:
        >>> import batchnorm as bn, torch
        >>> x, layers = torch.randn(100, 3), [bn.BatchNorm(3), bn.BatchNorm(3), bn.BatchNorm(3)]
        >>> for layer, part in zip(layers, (x[:30], x[30:], x)):
        ...     _ = bn.calibrate(layer, part)
        >>> one, other, whole = (layer.state_dict() for layer in layers)
        >>> merged = bn.merge_statistics([(one, 30), (other, 70)])
        >>> torch.allclose(merged["running_var"], whole["running_var"])
        True
    """
    given = [(state, n) for state, n in parts if n != 0]
    if not given:
        raise ValueError("there are no state dicts to merge, or all of them count 0")
    for at, (_, n) in enumerate(given):
        if not n >= 2:
            raise ValueError(
                f"state dict {at} counts {n}: expected the number of values a channel that its "
                "statistics stand for, 2 or more, or 0 to leave it out"
            )
    first = given[0][0]
    means = _means(first)
    for at, (state, _) in enumerate(given):
        if extra := [key for key in _means(state) if key not in first]:
            raise ValueError(
                f"state dict {at} has {extra[0]!r}, and the first has not: expected state dicts of "
                "one model"
            )
    merged: dict[str, Tensor] = {}
    for key in means:
        prefix = key.removesuffix("running_mean")
        own = [_moments(state, prefix, n, first, at) for at, (state, n) in enumerate(given)]
        total = Moments.sum(own)
        merged[key] = total.mean.to(first[key].dtype)
        merged[prefix + "running_var"] = total.var(correction=1).to(first[key].dtype)
        tracked = prefix + "num_batches_tracked"
        if all(tracked in state for state, _ in given):
            merged[tracked] = sum(
                (state[tracked].to(first[key].device) for state, _ in given),
                torch.zeros_like(first[tracked]),
            )
    return merged


def _means(state: Mapping[str, Tensor]) -> list[str]:
    return [key for key in state if key.split(".")[-1] == "running_mean"]


def _moments(
    state: Mapping[str, Tensor], prefix: str, n: float, first: Mapping[str, Tensor], at: int
) -> Moments:
    like = first[prefix + "running_mean"]
    for name in ("running_mean", "running_var"):
        key = prefix + name
        if key not in state or state[key].shape != like.shape:
            found = "nothing" if key not in state else f"size {tuple(state[key].shape)}"
            raise ValueError(
                f"{key!r} is of size {tuple(like.shape)} in the first state dict, and state "
                f"dict {at} has {found}: expected state dicts of one model"
            )
    mean, var = (
        state[prefix + name].to(like.device, torch.float64)
        for name in ("running_mean", "running_var")
    )
    return Moments(n, mean, var * (n - 1))


def _tracking(model: nn.Module, where: Where) -> dict[str, _BatchNorm]:
    found = batch_norms(model, where)
    return {name: layer for name, layer in found.items() if layer.running_mean is not None}


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None  # as `_tracking` saw
    assert var is not None
    return mean, var


def _gathered(
    layers: dict[str, _BatchNorm], pool: Synchronized
) -> dict[str, tuple[_BatchNorm, tuple[Tensor, Tensor, Tensor]]]:
    """Return for each layer the weights, means and variances of all processes, a row each."""
    if not layers:
        return {}
    device = _statistics(next(iter(layers.values())))[0].device
    parts: list[Tensor] = []
    for layer in layers.values():
        tracked = layer.num_batches_tracked
        count = torch.ones(1) if tracked is None else tracked.reshape(1)
        parts += [v.to(device, torch.float64) for v in (count, *_statistics(layer))]
    own = torch.cat(parts)
    agree(pool, own.numel(), device, "models with unequal numbers of statistics")
    sizes = [part.numel() for part in parts]
    found, pieces = {}, iter(torch.split(pool.gather(own), sizes, 1))
    for name, layer in layers.items():
        weights, means, variances = (next(pieces) for _ in range(3))
        if not bool((weights > 0).any()):
            weights = torch.ones_like(weights)
        found[name] = layer, (weights, means, variances)
    return found
