"""What training does to the affine part and to the statistics, where it does not do the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchnorm.diagnose.check.finding import Finding, number
from batchnorm.layers import BatchNorm

if TYPE_CHECKING:
    from batchnorm.diagnose.check.known import Known


def find(known: Known) -> Iterator[Finding]:
    """Find layers of which a part is frozen, and those with weight decay."""
    is_trained = known.model.training or any(p.requires_grad for p in known.model.parameters())
    for name, layer in known.layers.items():
        affine = [p for p in (layer.weight, layer.bias) if p is not None]
        if not affine or layer.running_mean is None or not is_trained:
            continue
        trained, frozen = any(p.requires_grad for p in affine), known.is_frozen(name)
        moves = not frozen and not (isinstance(layer, BatchNorm) and layer.update == "never")
        if trained and frozen:
            yield Finding(
                "trained_affine",
                "note",
                name,
                "the running statistics normalize in training too, and weight or bias is trained",
                "on purpose, in fine-tuning; or else one half of the layer was forgotten",
                f"bn.freeze(model, where={name!r})",
            )
        elif not trained and moves:
            yield Finding(
                "moving_statistics",
                "warning" if known.model.training else "note",
                name,
                "weight and bias require no gradient, but the statistics follow in training",
                "requires_grad says nothing about buffers: what was to be frozen drifts",
                f"bn.freeze(model, where={name!r})",
            )
    yield from _weight_decay(known)


def _weight_decay(known: Known) -> Iterator[Finding]:
    if known.optimizer is None:
        return
    decays = {
        id(parameter): (float(group["weight_decay"]), at)
        for at, group in enumerate(known.optimizer.param_groups)
        if group.get("weight_decay")
        for parameter in group["params"]
    }
    for name, layer in known.layers.items():
        decayed = [
            kind
            for kind, parameter in layer.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) in decays
        ]
        if not decayed:
            continue
        decay, at = decays[id(getattr(layer, decayed[0]))]
        yield Finding(
            "weight_decay",
            "note",
            name,
            f"{' and '.join(decayed)} {'have' if len(decayed) > 1 else 'has'} a weight decay of "
            f"{number(decay)}",
            "it pulls the scale of the channels to 0, and limits nothing that the next layer could "
            "not make up for: most recipes leave it out for all that has one dimension",
            f'g = optimizer.param_groups[{at}]; p = g["params"]; optimizer.add_param_group({{**g, '
            '"params": [p.pop(i) for i in reversed(range(len(p))) if p[i].ndim == 1], '
            '"weight_decay": 0})',
        )
