"""Settings that are mixed up: momentum, eps, the statistics' type, and none at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from batchnorm.diagnose.check.finding import Finding, number
from batchnorm.layers import BatchNorm

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known

#: From here on the last batch is nearly all that counts, which nobody wants: 9 parts of 10.
_CONVENTION = 0.9
_MISMATCH = 10
#: Of the variance: the output is then smaller by half of it.
_EPS_SHARE = 0.01
_HALF_TYPES = (torch.float16, torch.bfloat16)


def find(known: Known) -> Iterator[Finding]:
    """Find settings that are not what was meant."""
    for name, layer in known.layers.items():
        spelled = known.spelled(name)
        if layer.running_mean is None or (
            isinstance(layer, BatchNorm) and layer.statistics == "batch"
        ):
            has = layer.running_mean is not None
            yield Finding(
                "batch_dependent_evaluation",
                "warning",
                name,
                "it has no running statistics, in evaluation too"
                if not has
                else "statistics='batch'",
                "a prediction depends on what else is in the batch, and one example alone has none",
                f'{spelled}.statistics = "mode"'
                if has
                else f"{spelled}.track_running_stats = True; {spelled}.register_buffer("
                f'"running_mean", torch.zeros({layer.num_features})); {spelled}.register_buffer('
                f'"running_var", torch.ones({layer.num_features})); {spelled}.register_buffer('
                '"num_batches_tracked", torch.tensor(0)); bn.calibrate(model, data)',
            )
            continue
        yield from _momentum(known, name)
        if layer.running_mean.dtype in _HALF_TYPES:
            kind = str(layer.running_mean.dtype).removeprefix("torch.")
            resolution = torch.finfo(layer.running_mean.dtype).eps
            yield Finding(
                "half_statistics",
                "warning",
                name,
                f"running_mean and running_var are {kind}, with steps of {number(resolution)}",
                "a running average stops where a step is smaller than that, and large variances "
                "overflow",
                f"{spelled}.float()",
            )
    yield from _eps(known)


def _momentum(known: Known, name: str) -> Iterator[Finding]:
    layer = known.layers[name]
    momentum = layer.momentum
    is_still = isinstance(layer, BatchNorm) and layer.update == "never"
    if momentum is None or is_still or 0 < momentum < _CONVENTION:
        return
    if momentum == 0:
        yield Finding(
            "momentum_zero",
            "error",
            name,
            "momentum is 0: the running statistics never move",
            "None averages over all batches; 0 is no average at all",
            f"{known.spelled(name)}.momentum = 0.1",
        )
        return
    meant = round(1 - momentum, 6) if _CONVENTION <= momentum < 1 else 0.1
    yield Finding(
        "momentum_convention",
        "warning",
        name,
        f"momentum is {momentum}: the last batch counts {number(100 * momentum)} % of the running "
        "statistics",
        "Keras and Flax mean by it the share that is kept, PyTorch that of the new batch",
        f"{known.spelled(name)}.momentum = {meant}",
    )


def _eps(known: Known) -> Iterator[Finding]:
    if not known.layers:
        return
    counts = Counter(layer.eps for layer in known.layers.values())
    usual = min(counts, key=lambda eps: (-counts[eps], eps))  # of as many each, the smaller one
    for name, layer in known.layers.items():
        low, high = sorted((layer.eps, usual))
        if high < _MISMATCH * low * (1 - 1e-9):
            continue
        var = layer.running_var
        share = 0.0 if var is None else high / max(float(var.double().median()), high)
        yield Finding(
            "eps_mismatch",
            "warning" if share > _EPS_SHARE else "note",
            name,
            f"eps is {number(layer.eps)}, and {number(usual)} in {counts[usual]} of "
            f"{len(known.layers)} layers"
            + (f"; the larger one is {share:.1%} of its variance" if share else ""),
            "PyTorch's default is 1e-5 and Keras's 1e-3: weights that were moved from one to the "
            "other keep the eps that they were trained with",
            f"{known.spelled(name)}.eps = {usual}",
        )
