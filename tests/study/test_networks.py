"""The networks: the same weights whatever the norm, the norm before the activation, any shape."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.study.networks import NETWORKS, NORMS, build

SHAPES = [(1, 8, 8), (3, 32, 32), (2, 28, 28), (1, 9, 13), (5, 1, 1)]


def weights(model):
    return [layer.weight for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_seed_gives_the_same_weights_with_every_norm(network):
    first, *others = (weights(build(network, norm, (1, 8, 8), 10, 3)) for norm in NORMS)
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    another = weights(build(network, "plain", (1, 8, 8), 10, 4))
    assert all(not torch.equal(a, b) for a, b in zip(first, another, strict=True))


def test_the_weights_have_the_variance_that_the_textbooks_advise():
    _, second, *_ = weights(build("sigmoid", "plain", (1, 8, 8), 10, 0))  # 100 to 100: 1 / 100
    assert second.std().item() == pytest.approx(0.1, rel=0.03)
    *_, third, _ = weights(build("conv", "plain", (1, 8, 8), 10, 0))  # from 9 * 16: 2 / 144
    assert third.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.05)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_norm_stands_between_the_map_and_the_activation(network, norm):
    rank, activation = {
        "sigmoid": (1, nn.Sigmoid),
        "conv": (2, nn.ReLU),
    }[network]
    theirs = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[rank]
    ours = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d}[rank]
    expected = {"plain": [activation], "torch": [theirs, activation], "batchnorm": [ours]}[norm]
    model = list(build(network, norm, (1, 8, 8), 10, 0))
    maps = [i for i, layer in enumerate(model) if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(maps) == 4
    for place in maps[:-1]:
        assert (model[place].bias is not None) == (norm == "plain")
        after = model[place + 1 : place + 1 + len(expected)]
        assert [type(layer) for layer in after] == expected
        if norm == "batchnorm":
            assert after[0].activation == activation.__name__.lower()
    assert model[-1].bias.abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_any_shape(network, norm, shape):
    y = build(network, norm, shape, 7, 0)(torch.randn(4, *shape))
    assert y.shape == (4, 7)
    assert y.isfinite().all()


@pytest.mark.parametrize("network", NETWORKS)
def test_ours_computes_what_torch_does(network):
    x = torch.randn(60, 1, 8, 8, dtype=torch.float64)
    theirs, ours = (build(network, norm, (1, 8, 8), 10, 0).double() for norm in NORMS[1:])
    for _ in range(2):  # in training, then in evaluation with the statistics of that
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-12, atol=1e-12)
        theirs.eval()
        ours.eval()


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    expected = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    build("conv", "plain", (1, 8, 8), 10, 0)
    torch.testing.assert_close(torch.rand(3), torch.rand(3, generator=expected))
