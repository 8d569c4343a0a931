"""Folding in modules: the layers, their types, hooks and forwards of their own."""

import copy

import pytest
import torch
from models.fold.folding import IMAGES, ROWS, Model, fold, sequential, trained
from models.foreign import FixedEps, Frozen, FrozenWithAct, NormAct2d, OddEps
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.kernels.activations import NAMES
from batchnorm.models.compare import largest_error


def test_hooks_are_kept_and_what_they_see_counts():
    model = sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    assert fold(model, ROWS)[1].folded == {"1": ["0"]}
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    report = fold(model, ROWS)[1]
    assert "reads what it normalizes, too" in report.left["1"]


@pytest.mark.parametrize("activation", [None, *NAMES, ("leaky_relu", 0.3), ("elu", 0.5)])
@pytest.mark.parametrize("residual", [False, True])
def test_layers_of_this_package_leave_their_activation(activation, residual):
    model = Model(
        lambda m, x: m.norm(m.conv(x), residual=x) if residual else m.norm(m.conv(x)),
        conv=nn.Conv2d(4, 4, 1), norm=bn.BatchNorm2d(4, activation=activation),
    )  # fmt: skip
    folded, report = fold(trained(model), IMAGES)
    assert report.folded == {"norm": ["conv"]}
    if not residual:
        assert type(folded.norm).__module__.startswith("torch.nn")


@pytest.mark.parametrize(
    "norm",
    [
        lambda: bn.GhostBatchNorm(3, ghost_size=2),
        lambda: bn.BatchRenorm(3),
        lambda: bn.FrozenBatchNorm(3),
        lambda: bn.SyncBatchNorm(3),
        lambda: nn.SyncBatchNorm(3),
        lambda: bn.BatchNorm(3, channel_dim=-1),
    ],
    ids=["ghost", "renorm", "frozen", "sync", "torch's sync", "channels last"],
)
def test_other_layers(norm):
    assert fold(sequential(nn.Linear(4, 3), norm()), ROWS)[1].folded == {"1": ["0"]}


def test_channels_at_the_end():
    model = sequential(nn.Linear(4, 3), bn.BatchNorm(3, channel_dim=-1, activation="relu"))
    assert fold(model, torch.randn(2, 5, 6, 4))[1].folded == {"1": ["0"]}


LEFT = {
    "it has no running statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "it normalizes by the batch's own moments": lambda: bn.BatchNorm(3, statistics="batch"),
    "its statistics follow the data": lambda: bn.BatchNorm(3, update="always"),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_does_not_normalize_by_running_statistics_is_left(reason):
    model, x = sequential(nn.Linear(4, 3), LEFT[reason]()), ROWS.double()
    before = copy.deepcopy(model)
    folded, report = bn.fold(model, x)
    assert reason in report.left["1"]
    assert report.max_error == 0
    assert largest_error(before(x), folded(x)) == 0


def test_banks_are_left():
    model = sequential(nn.Linear(4, 3), bn.BankedBatchNorm(3, banks=("a", "b")))
    report = fold(model, ROWS)[1]
    assert report.left == {
        "1.banks.a": "another bank may take its place",
        "1.banks.b": "the example does not reach it",
    }


@pytest.mark.parametrize("norm", [Frozen, FrozenWithAct, NormAct2d, FixedEps])
def test_layers_of_other_packages(norm):
    layers = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4), nn.Sigmoid(), norm(4), nn.Sigmoid())
    folded, report = fold(trained(layers), IMAGES)
    assert report.folded == {"1": ["0"]}
    assert "it normalizes what sigmoid returns" in report.left["3"]
    assert type(folded[1]) in (nn.Identity, nn.ReLU)
    assert type(folded[3]) is norm


def test_a_layer_of_another_package_that_computes_something_else_is_left():
    report = fold(trained(nn.Sequential(nn.Conv2d(4, 4, 1), OddEps(4))), IMAGES)[1]
    assert report.left == {
        "1": "it is a OddEps, and a copy of it did not compute frozen batch normalization"
    }


def test_a_layer_that_does_more_than_normalize_is_left():
    class Louder(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input) * 2

    report = fold(sequential(nn.Linear(4, 3), Louder(3)), ROWS)[1]
    assert report.left == {"1": "it is a Louder, a subclass: what its forward does is not known"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    for norm in (nn.BatchNorm2d, bn.BatchNorm2d):
        model = sequential(nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
        model, x = model.to(dtype), IMAGES.to(dtype)
        folded, report = bn.fold(model, x)
        assert report.folded == {"1": ["0"]}
        assert {p.dtype for p in folded.parameters()} == {dtype}
        exact = copy.deepcopy(model).double()(x.double())
        assert largest_error(exact, folded(x)) <= 2 * largest_error(exact, model(x)) + 1e-3


def test_a_wide_batch_norm_in_a_half_model():
    model = Model(
        lambda m, x: m.norm(m.conv(x).float()).to(x.dtype), conv=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    model = trained(model).half()
    model.norm.float()
    folded, report = bn.fold(model, IMAGES.half())
    assert report.folded == {"norm": ["conv"]}
    assert folded.conv.bias.dtype == torch.float16


def test_values_that_the_type_cannot_hold_are_left():
    model = sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[1].running_var.fill_(0)
    model[1].weight.data.fill_(1e4)
    report = bn.fold(model.half(), ROWS.half(), verify=False)[1]
    assert report.left["1"].startswith("'0' would have numbers too large for torch.float16")


def test_what_is_kept_of_a_parameter():
    model = sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    model.to(memory_format=torch.channels_last).requires_grad_(False)
    folded, _ = fold(model, IMAGES)
    assert isinstance(folded[0].weight, nn.Parameter)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in folded.parameters()] == [False, False]
    model.requires_grad_(True)
    assert [p.requires_grad for p in fold(model, IMAGES)[0].parameters()] == [True, True]


def test_a_convolution_with_a_forward_of_its_own_is_verified():
    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    class Deaf(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight)

    for kind, folds in ((Same, True), (Deaf, False)):
        model = sequential(kind(4, 4, 3, bias=False), nn.BatchNorm2d(4))
        report = fold(model, IMAGES)[1]
        assert bool(report.folded) == folds
        report = fold(model, IMAGES, verify=False)[1]
        assert "whether its forward adds one is not verified" in report.left["1"]
