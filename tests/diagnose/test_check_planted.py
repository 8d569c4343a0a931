"""Faults that are planted: each is found, at its layer, alone; and its fix removes it."""

import pytest
import torch
from diagnose.planted import (
    BOTH,
    FEATURES,
    dense,
    examples,
    found,
    healthy,
    loader,
    setting,
    train,
)
from torch import nn

import batchnorm as bn
from batchnorm.diagnose.check import check


class Plant:
    """A fault.

    Args:
        code: The finding that it is.
        layers: Where.
        plant: Changes a model, or returns another one.
        data: Returns the data to check with, or is None.
        severity: How bad it is.
        options: Returns further arguments, given the model.
        fixed: Whether the fix removes the finding.
    """

    def __init__(
        self, code, layers, plant, data=loader, severity="warning", options=None, fixed=True
    ):
        self.code, self.layers, self.plant, self.data = code, layers, plant, data
        self.severity, self.options, self.fixed = severity, options, fixed


def no_data():
    return None


@torch.no_grad()
def scale_second_weight(model):
    model[3].weight.mul_(3)


@torch.no_grad()
def kill_channel(model):
    model[0].weight[3] = 0
    bn.calibrate(model, loader(), sequential=True)


def large_eps(model):
    setting(BOTH, eps=10.0)(model)
    bn.calibrate(model, loader(), sequential=True)


def with_dropout(model):
    new = dense()
    return train(nn.Sequential(*new[:3], nn.Dropout(0.5), *new[3:]), loader())


@torch.no_grad()
def with_bias(model):
    new = nn.Linear(FEATURES, 24)
    new.weight.copy_(model[0].weight)
    model[1].running_mean += new.bias
    model[0] = new


def fill(layer, buffer, value, at=slice(None)):
    def plant(model):
        getattr(model[layer], buffer)[at] = value

    return plant


def freed(model):
    return model.requires_grad_(False)


def young(model):
    model = dense(momentum=0.01)
    return train(model, loader())


def without_statistics(model):
    model[4] = nn.BatchNorm1d(24, track_running_stats=False)


def with_ghosts(model):
    model[4] = ghost = bn.GhostBatchNorm(24, ghost_size=4)
    bn.calibrate(model, loader(), sequential=True)
    assert ghost.ghost_size == 4


def sorted_by_class():
    x, y = examples()
    order = y.argsort()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[order], y[order]), 32)


def decay(model):
    return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)}


PLANTS = {
    "weights changed": Plant("eval_train_gap", "4", scale_second_weight),
    "data moved": Plant(
        "eval_train_gap", "1", lambda model: None,
        lambda: [(x + 3, y) for x, y in loader()], severity="error",
    ),
    "never updated": Plant(
        "never_updated", "4", lambda model: model[4].reset_running_stats(), severity="error"
    ),
    "never updated, by the weights": Plant(
        "never_updated", BOTH, lambda model: [model[i].reset_running_stats() for i in (1, 4)],
        no_data, "error",
    ),
    "too young": Plant("not_converged", BOTH, young),
    "too young, by the buffers": Plant("not_converged", BOTH, young, no_data),
    "momentum 0": Plant("momentum_zero", "4", setting("4", momentum=0), severity="error"),
    "momentum 0.9": Plant("momentum_convention", "1", setting("1", momentum=0.9)),
    "momentum 0.99": Plant("momentum_convention", BOTH, setting(BOTH, momentum=0.99), no_data),
    "eps of Keras": Plant("eps_mismatch", "4", setting("4", eps=1e-3), severity="note"),
    "eps over the variance": Plant("eps_over_variance", BOTH, large_eps),
    "constant channel": Plant("constant_channels", "1", kill_channel, severity="note", fixed=False),
    "exploding": Plant("exploding_variance", "4", fill(4, "running_var", 1e8)),
    "NaN": Plant("non_finite_statistics", "1", fill(1, "running_mean", torch.nan, 2),
                 severity="error"),
    "infinite": Plant("non_finite_statistics", "4", fill(4, "running_var", torch.inf, 2), no_data,
                      "error"),
    "negative": Plant("negative_variance", "4", fill(4, "running_var", -1, 2), severity="error"),
    "NaN weight": Plant(
        "non_finite_affine", "4", lambda model: fill(4, "weight", torch.nan, 2)(freed(model)),
        no_data, "error",
    ),
    "NaN data": Plant(
        "non_finite_input", "1", lambda model: None,
        lambda: [*loader(), (torch.full((32, FEATURES), torch.nan), torch.arange(32) % 4)],
        "error",
    ),
    "small batches": Plant("small_batch", BOTH, lambda model: None, lambda: loader(4)),
    "small ghost batches": Plant("small_batch", "4", with_ghosts),
    "frozen statistics": Plant(
        "trained_affine", "4", lambda model: bn.freeze(model, affine=False, where="4") and None,
        severity="note",
    ),
    "kept in evaluation": Plant(
        "trained_affine", "4", lambda model: model.train()[4].eval() and None, severity="note"
    ),
    "frozen, and the data moved": Plant(
        "eval_train_gap", "1", lambda model: bn.freeze(model) and None,
        lambda: [(x + 3, y) for x, y in loader()],
    ),
    "frozen affine part": Plant(
        "moving_statistics", "4",
        lambda model: bn.freeze(model.train(), statistics=False, where="4") and None,
    ),
    "weight decay": Plant(
        "weight_decay", BOTH, lambda model: None, no_data, "note", options=decay
    ),
    "bias": Plant("bias_before_norm", "1", with_bias, severity="note"),
    "dropout": Plant("dropout_before_norm", "5", with_dropout, fixed=False),
    "no statistics": Plant("batch_dependent_evaluation", "4", without_statistics),
    "by the batch": Plant(
        "batch_dependent_evaluation", "4",
        lambda model: bn.convert(model) and setting("4", statistics="batch")(model),
    ),
    "half": Plant("half_statistics", BOTH, lambda model: model.half(), no_data),
    "sorted by class": Plant(
        "unshuffled_batches", "1", lambda model: None, sorted_by_class, fixed=True
    ),
}  # fmt: skip

#: What cannot be planted in layers of this package.
OF_TORCH = {"half"}


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
@pytest.mark.parametrize("name", PLANTS)
def test_what_is_planted_is_found_alone_and_its_fix_removes_it(name, ours):
    case, model = PLANTS[name], healthy()
    if ours and name not in OF_TORCH:
        bn.convert(model)
    changed = case.plant(model)
    model = changed if isinstance(changed, nn.Module) else model
    data = case.data()
    options = case.options(model) if case.options else {}
    report = check(model, data, **options)
    assert found(report) == [(case.code, layer) for layer in case.layers]
    [*_, finding] = [f for f in report.findings if f.code == case.code]
    assert finding.severity == case.severity
    assert report.ok == (case.severity == "note")
    assert max(map(len, repr(report).splitlines())) <= 80
    names = {"model": model, "bn": bn, "torch": torch, "data": data or loader(), **options}
    names["checkpoint"] = healthy().state_dict()
    for line in dict.fromkeys(f.fix for f in report.findings if f.code == case.code):
        exec(line, names)
    after = check(model, names["data"] if data is not None else None, **options)
    if case.fixed:
        assert case.code not in [f.code for f in after.findings]
