"""Channels and buffers whose numbers are no use: constant, exploding, not finite, negative."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

from torch import Tensor

from batchnorm.diagnose.check.finding import Finding, number

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known

#: By PyTorch's eps, a channel of that variance is scaled down to a thirtieth: nothing is in it.
_DEAD = 1e-8
#: A standard deviation of 1000, where half a type ends at 65 of them; and 100 times the others'.
_LARGE, _BEYOND = 1e6, 1e4
#: The largest that a framework has by default: where it is more than the variance, that is small.
_USUAL_EPS = 1e-3
_LETTERS = 40  # of a list of channels in a fix


def find(known: Known) -> Iterator[Finding]:
    """Find channels with nothing in them, and numbers that are none."""
    yield from _not_numbers(known)
    medians = {
        name: float(layer.running_var.double().median())
        for name, layer in known.layers.items()
        if layer.running_var is not None
    }
    for name, layer in known.layers.items():
        var = layer.running_var
        seen = known.seen.get(name)
        has_values = seen is not None and seen.moments is not None and seen.moments.count > 1
        dead = var.new_zeros(var.shape).bool() if var is not None else None
        if var is not None:
            dead = var.double().abs() < _DEAD
        if has_values and seen is not None:
            constant = seen.constant()
            dead = constant if dead is None else dead | constant
        if dead is not None and bool(dead.any()):
            yield _constant(known, name, dead)
        if var is None or dead is None:
            continue
        live = var[~dead].double()
        below = live[(live >= 0) & (live < layer.eps)]
        if len(below):
            is_usual = layer.eps <= _USUAL_EPS or 2 * len(below) < len(live)
            yield Finding(
                "eps_over_variance",
                "note" if is_usual else "warning",
                name,
                f"eps is {number(layer.eps)}, and the variance of {len(below)} of {len(live)} "
                f"channels that vary is below, down to {number(float(below.min()))}",
                "eps, and not the variance, decides the scale: what comes out is smaller than 1",
                f"{known.spelled(name)}.eps = 1e-5"
                if layer.eps > 1e-5
                else f"{known.spelled(name)}.eps = {number(float(below.median()) / 100)}",
            )
        others = [value for other, value in medians.items() if other != name] or [medians[name]]
        largest = float(var.double().nan_to_num(0, 0, 0).max())
        if largest > _LARGE and largest > _BEYOND * abs(median(others)):
            count = int((var > _LARGE).sum())
            yield Finding(
                "exploding_variance",
                "warning",
                name,
                f"running_var is up to {number(largest)}, over 1e6 in {count} of {len(var)} "
                f"channels; the median of the other layers is {number(median(others))}",
                "what comes before it grew without bound, or a batch with huge values was taken in",
                known.recalibrated(name),
            )


def _not_numbers(known: Known) -> Iterator[Finding]:
    """Yield buffers and parameters that are not finite, or negative; and such inputs, the first."""
    broken = False
    for name, layer in known.layers.items():
        tensors = {
            "running_mean": layer.running_mean,
            "running_var": layer.running_var,
            "weight": layer.weight,
            "bias": layer.bias,
        }
        bad = {
            kind: int((~values.isfinite()).sum())
            for kind, values in tensors.items()
            if values is not None and not bool(values.isfinite().all())
        }
        if bad:
            broken = True
            is_statistic = any(kind.startswith("running") for kind in bad)
            yield Finding(
                "non_finite_statistics" if is_statistic else "non_finite_affine",
                "error",
                name,
                ", ".join(f"{kind} is NaN or infinite in {n} channels" for kind, n in bad.items()),
                "a batch that was not finite went into the running average, which keeps it for ever"
                if is_statistic
                else "training diverged",
                f"{known.spelled(name)}.reset_running_stats(); {known.recalibrated(name)}"
                if is_statistic
                else "model.load_state_dict(checkpoint)  # of before it diverged",
            )
        var = layer.running_var
        if var is not None and bool((var < 0).any()):
            broken = True
            yield Finding(
                "negative_variance",
                "error",
                name,
                f"running_var is negative in {int((var < 0).sum())} of {len(var)} channels, down "
                f"to {number(float(var.double().nan_to_num(0).min()))}",
                "no data have such a variance: weights were averaged, extrapolated or quantized, "
                "and the statistics with them",
                known.recalibrated(name),
            )
    first = next((name for name, seen in known.seen.items() if seen.not_finite), None)
    if first is not None and not broken:
        seen = known.seen[first]
        yield Finding(
            "non_finite_input",
            "error",
            first,
            f"{seen.not_finite} of {seen.calls} batches that it got are not finite",
            "the data, or the layers before it, give NaN or overflow",
            "data = [batch for batch in data if torch.isfinite(batch[0]).all()]",
        )


def _constant(known: Known, name: str, dead: Tensor) -> Finding:
    count, size = int(dead.sum()), len(dead)
    shown = ", ".join(str(at) for at in dead.nonzero().flatten().tolist()[:5])
    more, spelled = ", ..." if count > 5 else "", known.spelled(name)
    which = str(dead.nonzero().flatten().tolist())
    layer = known.layers[name]
    if len(which) > _LETTERS and layer.running_var is not None:
        which = f"{spelled}.running_var < {_DEAD}"
    return Finding(
        "constant_channels",
        "warning" if 2 * count >= size else "note",
        name,
        f"{count} of {size} channels do not vary (number {shown}{more})",
        "what makes them is 0 or cut off, as by a ReLU that never opens: they carry nothing",
        f"{spelled}.weight.data[{which}] = 0  # or start them anew, before the layer"
        if layer.weight is not None
        else f"{which}  # start these channels anew, in the layer before",
    )
