"""Folding in modules: what is folded computes what it did, wherever it stands."""

import copy

import pytest
import torch
from models.fold.folding import IMAGES, ROWS, Model, fold, sequential, trained
from torch import nn
from torch.nn import functional as F

AFTER = {
    "conv1d": (lambda b: nn.Conv1d(4, 6, 3, padding=1, bias=b), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda b: nn.Conv2d(4, 6, 3, 2, padding=1, bias=b), nn.BatchNorm2d, (2, 4, 8, 8)),
    "grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (2, 4, 8, 8)),
    "depthwise": (
        lambda b: nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=b),
        nn.BatchNorm2d,
        (2, 4, 8, 8),
    ),
    "conv3d": (lambda b: nn.Conv3d(4, 6, 2, dilation=2, bias=b), nn.BatchNorm3d, (2, 4, 5, 5, 5)),
    "transposed 1d": (
        lambda b: nn.ConvTranspose1d(4, 6, 3, stride=2, bias=b),
        nn.BatchNorm1d,
        (2, 4, 9),
    ),
    "transposed 2d, grouped": (
        lambda b: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=b),
        nn.BatchNorm2d,
        (2, 4, 5, 5),
    ),
    "transposed 3d": (
        lambda b: nn.ConvTranspose3d(4, 6, 2, bias=b),
        nn.BatchNorm3d,
        (2, 4, 3, 3, 3),
    ),
    "linear": (lambda b: nn.Linear(4, 6, bias=b), nn.BatchNorm1d, (5, 4)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", AFTER)
def test_a_batch_norm_after(kind, bias):
    layer, norm, shape = AFTER[kind]
    conv = layer(bias)
    channels = getattr(conv, "out_channels", None) or conv.out_features
    options = {} if bias else {"affine": False, "momentum": None}
    folded, report = fold(
        sequential(conv, norm(channels, **options), nn.ReLU()), torch.randn(shape)
    )
    assert report.folded == {"1": ["0"]}
    assert report.left == {}
    assert type(folded[1]) is nn.Identity
    assert type(folded[0]) is type(conv)
    assert folded[0].bias is not None
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]


BEFORE = {
    "linear": nn.Linear(4, 6),
    "linear without bias": nn.Linear(4, 6, bias=False),
    "conv": nn.Conv2d(4, 6, 3, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding="valid"),
    "padded by what is there": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflected": nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    "one pixel": nn.Conv2d(4, 6, 1, padding="same"),
    "transposed, of one pixel": nn.ConvTranspose2d(4, 6, 1),
}


@pytest.mark.parametrize("kind", BEFORE)
def test_a_batch_norm_before(kind):
    layer = copy.deepcopy(BEFORE[kind])
    is_linear = isinstance(layer, nn.Linear)
    norm = nn.BatchNorm1d(4) if is_linear else nn.BatchNorm2d(4)
    _, report = fold(sequential(norm, layer), ROWS if is_linear else IMAGES)
    assert report.folded == {"0": ["1"]}


UNEVEN = {
    "pads with zeros": nn.Conv2d(4, 6, 3, padding=1),
    "which pads": nn.Conv2d(4, 6, 3, padding="same"),
    "pads": nn.Conv2d(4, 6, 1, padding=1),
    "is transposed": nn.ConvTranspose2d(4, 6, 3),
    "transposed": nn.ConvTranspose2d(4, 6, 1, stride=2),
}


@pytest.mark.parametrize("reason", UNEVEN)
def test_a_shift_before_zero_padding_is_left_and_a_scale_is_not(reason):
    model = sequential(nn.BatchNorm2d(4), copy.deepcopy(UNEVEN[reason]))
    _, report = fold(model, IMAGES)
    assert report.folded == {}
    assert reason in report.left["0"]
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias.zero_()
    assert fold(model, IMAGES)[1].folded == {"0": ["1"]}


def test_between_two_it_goes_into_the_first():
    model = sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5))
    _, report = fold(model, ROWS)
    assert report.folded == {"1": ["0"], "3": ["2"]}


def test_several_in_a_row():
    model = sequential(
        *(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), nn.Linear(4, 3), nn.BatchNorm1d(3),
        nn.BatchNorm1d(3),
    )  # fmt: skip
    folded, report = fold(model, ROWS)
    assert list(report.folded.values()) == [["2"]] * 4
    assert list(report.folded) == ["0", "1", "3", "4"]
    assert list(folded.state_dict()) == ["2.weight", "2.bias"]


def test_before_several_it_goes_into_all():
    model = Model(
        lambda m, x: m.q(y := m.norm(x)) * m.k(y), norm=nn.BatchNorm1d(4), q=nn.Linear(4, 3),
        k=nn.Linear(4, 3),
    )  # fmt: skip
    _, report = fold(trained(model), ROWS)
    assert report.folded == {"norm": ["q", "k"]}


def test_an_output_that_is_used_twice():
    parts = {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}
    of_norm = Model(lambda m, x: F.relu(y := m.norm(m.conv(x))) + y, **parts)
    assert fold(trained(of_norm), IMAGES)[1].folded == {"norm": ["conv"]}
    of_conv = Model(lambda m, x: F.relu(y := m.conv(x)) + m.norm(y), **parts)
    report = fold(trained(of_conv), IMAGES)[1]
    assert report.left == {"norm": "relu reads what it normalizes, too; add reads what it returns"}
    returned = Model(lambda m, x: (y := m.conv(x), m.norm(y)), **parts)
    report = fold(trained(returned), IMAGES)[1]
    assert "the output reads what it normalizes, too" in report.left["norm"]


def test_shared_modules():
    parts = {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}
    together = Model(lambda m, x: m.norm(m.conv(F.relu(m.norm(m.conv(x))))), **parts)
    assert fold(trained(together), IMAGES)[1].folded == {"norm": ["conv"]}
    apart = Model(lambda m, x: m.norm(m.conv(m.conv(x))), **parts)
    assert fold(trained(apart), IMAGES)[1].left == {
        "norm": "'conv' is called elsewhere, too, without it; the output reads what it returns"
    }
    two = Model(
        lambda m, x: m.first(m.conv(x)) + m.second(m.conv(x)),
        conv=nn.Conv2d(4, 4, 1), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4),
    )  # fmt: skip
    assert set(fold(trained(two), IMAGES)[1].left) == {"first", "second"}
    both = Model(
        lambda m, x: m.norm(m.one(x)) + m.norm(m.two(x)),
        one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    _, report = fold(trained(both), IMAGES)
    assert report.folded == {"norm": ["one", "two"]}


def test_a_layer_under_two_names_is_gone_under_both():
    shared = nn.BatchNorm1d(3)
    model = Model(
        lambda m, x: m.inner[1](m.linear(x)), linear=nn.Linear(4, 3),
        norm=shared, inner=nn.ModuleList([nn.Identity(), shared]),
    )  # fmt: skip
    folded, report = fold(trained(model), ROWS)
    assert report.folded == {"norm": ["linear"]}
    assert folded.norm is folded.inner[1]
    assert list(folded.state_dict()) == ["linear.weight", "linear.bias"]


THROUGH = {
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "contiguous": lambda x: x.contiguous().clone(),
    "there and back": lambda x: x.permute(0, 2, 3, 1).contiguous().movedim(-1, 1),
    "flattened": lambda x: x.flatten(2).unflatten(2, (8, 8)),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "pooled": lambda x: F.adaptive_avg_pool2d(x, 2),
    "reflected": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "a type": lambda x: x.to(torch.float64).double(),
    "an axis more": lambda x: x.unsqueeze(0).squeeze(0),
}


@pytest.mark.parametrize("kind", THROUGH)
def test_what_moves_values_is_seen_through(kind):
    parts = {"conv": nn.Conv2d(4, 4, 1, bias=False), "norm": nn.BatchNorm2d(4)}
    after = Model(lambda m, x: F.relu(m.norm(THROUGH[kind](m.conv(x)))), **parts)
    assert fold(trained(after), IMAGES)[1].folded == {"norm": ["conv"]}
    before = Model(lambda m, x: m.conv(THROUGH[kind](m.norm(F.relu(x)))), **parts)
    assert fold(trained(before), IMAGES)[1].folded == {"norm": ["conv"]}


def test_the_channels_are_followed():
    steps = Model(
        lambda m, x: m.norm(m.linear(x).flatten(0, 1)).reshape(2, 8, 3),
        linear=nn.Linear(4, 3), norm=nn.BatchNorm1d(3),
    )  # fmt: skip
    assert fold(trained(steps), torch.randn(2, 8, 4))[1].folded == {"norm": ["linear"]}
    turned = Model(
        lambda m, x: m.norm(m.linear(x).mT), linear=nn.Linear(4, 3), norm=nn.BatchNorm1d(3)
    )
    assert fold(trained(turned), torch.randn(2, 8, 4))[1].folded == {"norm": ["linear"]}
    others = Model(lambda m, x: m.norm(m.linear(x)), linear=nn.Linear(4, 8), norm=nn.BatchNorm1d(8))
    report = fold(trained(others), torch.randn(2, 8, 4))[1]
    assert "its channels are not those of 'linear'" in report.left["norm"]
    mixed = Model(
        lambda m, x: m.norm(m.linear(x).reshape(2, 4, 6)), linear=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(4),
    )  # fmt: skip
    report = fold(trained(mixed), torch.randn(2, 8, 4))[1]
    assert "reshape does not keep its channels as one dimension" in report.left["norm"]
