"""Copies and processes whose statistics are those of another model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.check.age import is_initial
from batchnorm.diagnose.check.finding import Finding, number
from batchnorm.diagnose.check.gap import gaps
from batchnorm.models.statistics import assert_statistics_agree
from batchnorm.models.walk import batch_norms

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known


def find(known: Known) -> Iterator[Finding]:
    """Find copies with statistics of other weights, and processes that do not agree."""
    for copy, model in known.copies.items():
        yield from _of_copy(known, copy, model)
    if known.process_group is None or not known.layers:
        return
    try:
        assert_statistics_agree(
            known.model, known.process_group, where=lambda name, _: name in known.layers
        )
    except RuntimeError as error:
        apart = re.match(
            r"the running \w+ of '(?P<layer>.*?)' on (?P<ranks>ranks? [\d, ]+)", str(error)
        )
        if apart is None:  # another error
            raise
        yield Finding(
            "ranks_disagree",
            "error",
            apart["layer"],
            f"the running statistics on {apart['ranks'].strip()} are not those of rank 0",
            "each process followed its own part of the data, and a checkpoint has those of one",
            "bn.reduce_statistics(model)",
        )


def _of_copy(known: Known, copy: str, model: nn.Module) -> Iterator[Finding]:
    layers, evidence = batch_norms(model), ""
    seen = known.of_copies.get(copy)
    if seen is not None:
        found = gaps(layers, seen)
        layer = next((name for name, gap in found.items() if gap.is_open), None)
        if layer is None:
            return
        evidence = (
            f"what it gets is {number(found[layer].distance)} standard deviations from its running "
            "statistics"
        )
    else:
        if _has_weights_of(known.model, model):
            return
        by_end = {
            _end(name): other
            for name, other in known.layers.items()
            if other.running_mean is not None
        }
        layer = None
        for name, own in layers.items():
            other = by_end.get(_end(name))
            if is_initial(own) and other is not None and not is_initial(other):
                layer, evidence = name, "its running statistics are those that a layer begins with"
            elif other is not None and not is_initial(own) and _is_same(own, other):
                layer, evidence = name, "its weights are not the model's, but its statistics are"
            if layer is not None:
                break
        if layer is None:
            return
    yield Finding(
        "copy_statistics",
        "error",
        f"{copy}.{layer}" if layer else copy,
        evidence,
        "averaged weights have seen no data: their statistics are to be taken anew",
        f"bn.calibrate({copy}, data)"
        if copy.isidentifier()
        else f"bn.calibrate(copies[{copy!r}], data)",
    )


def _end(name: str) -> str:
    """Return a name without what a wrapper puts before it."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def _has_weights_of(model: nn.Module, copy: nn.Module) -> bool:
    own = {_end(name): values for name, values in model.named_parameters()}
    others = {_end(name): values for name, values in copy.named_parameters()}
    return own.keys() == others.keys() and all(
        torch.equal(values.to(others[name].device), others[name]) for name, values in own.items()
    )


def _is_same(layer: _BatchNorm, other: _BatchNorm) -> bool:
    return all(
        torch.equal(a.to(b.device), b)
        for name in ("running_mean", "running_var")
        if (a := getattr(layer, name)) is not None and (b := getattr(other, name)) is not None
    )
