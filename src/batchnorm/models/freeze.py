"""Freezing: statistics and affine part apart, and whatever `.train()` says."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm
from batchnorm.models.adopt import adopt, check_adoptable, let_go
from batchnorm.models.report import Report
from batchnorm.models.walk import Where, batch_norms

_BEFORE = "_before_freezing"


def freeze(
    model: nn.Module, *, statistics: bool = True, affine: bool = True, where: Where = None
) -> Report:
    """Freeze the batch norms of a model, until `unfreeze`.

    Frozen statistics: the running moments normalize and nothing updates them, in training too. A
    frozen affine part: weight and bias require no gradient. `model.train()` changes neither, eps
    and momentum stay, and layers of `torch.nn` are held to it as well. Of a weight or bias that is
    parametrized (`torch.nn.utils.parametrize`) everything that it is made from is frozen.

    Args:
        model: The model, changed in place.
        statistics: Whether the statistics are frozen.
        affine: Whether weight and bias are.
        where: Which layers: a pattern of names, as `"backbone.*"`, several, or a function of the
            name and the layer; all if left out.

    Returns:
        What was frozen, and what was left, with the reason.

    Raises:
        ValueError: `where` names no layer.
        TypeError: The statistics are to be frozen of a layer of a class of which nobody knows what
            its forward does.

    Example:
        >>> import batchnorm as bn, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        >>> bn.freeze(model, affine=False)
        1 frozen: 1
        >>> y = model.train()(torch.randn(8, 3))
        >>> model[1].num_batches_tracked, model[1].weight.requires_grad
        (tensor(0), True)
    """
    report, layers = Report("frozen"), batch_norms(model, where)
    if statistics:
        check_adoptable({n: layer for n, layer in layers.items() if layer.running_mean is not None})
    for name, layer in layers.items():
        before = layer.__dict__.get(_BEFORE, {})
        if statistics and layer.running_mean is None:
            report.left[name] = "it has no running statistics to normalize by"
        elif statistics:
            ours = adopt(name, layer, "freeze")
            before.setdefault("statistics", {"statistics": ours.statistics, "update": ours.update})
            ours.statistics, ours.update = "running", "never"
        if affine:
            trained = before.setdefault("affine", set())
            for parameter, values in _affine(layer):
                if values.requires_grad:  # or else the user, or a layer that shares it, froze it
                    trained.add(parameter)
                    values.requires_grad_(False)
        if before:
            layer.__dict__[_BEFORE] = before
        if name not in report.left:
            report.done.append(name)
    return report


def unfreeze(
    model: nn.Module, *, statistics: bool = True, affine: bool = True, where: Where = None
) -> Report:
    """Undo `freeze`: every setting is again what it was before.

    Args:
        model: The model, changed in place.
        statistics: Whether the statistics are unfrozen.
        affine: Whether weight and bias are.
        where: Which layers; see `freeze`.

    Returns:
        What was unfrozen, and what was left, with the reason.

    Raises:
        ValueError: `where` names no layer.

    Example:
        >>> import batchnorm as bn
        >>> layer = bn.BatchNorm(3)
        >>> _ = bn.freeze(layer)
        >>> bn.unfreeze(layer)
        1 unfrozen: itself
        >>> layer.statistics, layer.update, layer.weight.requires_grad
        ('mode', 'training', True)
    """
    report = Report("unfrozen")
    for name, layer in batch_norms(model, where).items():
        before = layer.__dict__.get(_BEFORE, {})
        settings = before.pop("statistics", None) if statistics else None
        trained = before.pop("affine", None) if affine else None
        if settings is None and trained is None:
            report.left[name] = "it was not frozen"
            continue
        for parameter, values in _affine(layer):
            if parameter in (trained or ()):
                values.requires_grad_(True)
        if not before:
            del layer.__dict__[_BEFORE]
        if settings is not None:
            assert isinstance(layer, BatchNorm)
            for setting, value in settings.items():
                setattr(layer, setting, value)
            let_go(layer, "freeze")
        report.done.append(name)
    return report


def _affine(layer: _BatchNorm) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a layer's affine part, with what its parametrizations have."""
    for name, parameter in layer.named_parameters():
        if "." not in name or name.startswith("parametrizations."):
            yield name, parameter
