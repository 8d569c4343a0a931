"""The networks: the same weights whatever the recipe, each layer in its place, any shape."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.study.networks import NETWORKS, Block, activations, build, maps, norms
from batchnorm.study.recipes import ACTIVATIONS, NORMALIZED, PLAIN, TORCH, Recipe

SHAPES = [(1, 8, 8), (3, 32, 32), (2, 28, 28), (1, 9, 13), (5, 1, 1)]
RECIPES = [
    PLAIN,
    TORCH,
    NORMALIZED,
    Recipe("batchnorm", fused=True),
    Recipe("batchnorm", place="after", first=True),
    Recipe("ghost", group=2),
    Recipe("renormalized"),
    Recipe("batchnorm", dropout="before"),
    Recipe("batchnorm", dropout="after", affine="absent"),
]


def made(name, recipe=PLAIN, shape=(1, 8, 8), classes=10, seed=0):
    return build(NETWORKS[name], recipe, shape, classes, seed)


def layers(name, recipe):
    """The names of the layers of a network that has no blocks."""
    return [type(layer).__name__ for layer in made(name, recipe)[-1]]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_seed_gives_the_same_weights_with_every_recipe(network):
    first, *others = (maps(made(network, recipe, seed=3)) for recipe in RECIPES)
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=0)
    another = maps(made(network, seed=4))
    assert all(not torch.equal(a.weight, b.weight) for a, b in zip(first, another, strict=True))
    assert all(layer.bias is None or layer.bias.abs().max() == 0 for layer in first)


@pytest.mark.parametrize(
    ("initialization", "variance"),
    [("", 1 / 100), ("he", 2 / 100), ("small", 1e-4), ("gaussian", 1e-2), ("large", 9 / 100)],
)
def test_the_weights_have_the_variance_that_they_should(initialization, variance):
    second = maps(made("sigmoid", Recipe(initialization=initialization)))[1]  # from 100 to 100
    assert second.weight.std().item() == pytest.approx(variance**0.5, rel=0.03)
    third = maps(made("conv", Recipe(initialization=initialization)))[2]  # from 9 * 16, to 32 * 9
    if not initialization:
        assert third.weight.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "expected", "bias"),
    [
        (PLAIN, ["Sigmoid"], True),
        (TORCH, ["BatchNorm1d", "Sigmoid"], False),
        (NORMALIZED, ["BatchNorm1d", "Sigmoid"], False),
        (Recipe("batchnorm", fused=True), ["BatchNorm1d"], False),
        (Recipe("torch", fused=True), ["BatchNorm1d", "Sigmoid"], False),
        (Recipe("batchnorm", place="after"), ["Sigmoid", "BatchNorm1d"], True),
        (Recipe("batchnorm", place="after", fused=True), ["Sigmoid", "BatchNorm1d"], True),
        (Recipe("ghost"), ["GhostBatchNorm", "Sigmoid"], False),
        (Recipe("renormalized"), ["BatchRenorm", "Sigmoid"], False),
        (Recipe(dropout="after"), ["Sigmoid", "Dropout"], True),
        (Recipe("batchnorm", dropout="after"), ["BatchNorm1d", "Sigmoid", "Dropout"], False),
        (Recipe("batchnorm", dropout="before"), ["Dropout", "BatchNorm1d", "Sigmoid"], False),
    ],
)
def test_every_layer_is_in_its_place(recipe, expected, bias):
    assert layers("sigmoid", recipe) == ["Flatten", *(["Linear", *expected] * 3), "Linear"]
    model = made("sigmoid", recipe)
    assert [(layer.bias is not None) for layer in maps(model)] == [bias] * 3 + [True]
    package = "torch" if recipe.norm == "torch" else "batchnorm"
    assert all(type(layer).__module__.startswith(package) for layer in norms(model))
    if recipe.fused and recipe.norm == "batchnorm" and recipe.place == "before":
        assert all(layer.activation == "sigmoid" for layer in norms(model))


def test_a_recipe_sets_the_layers():
    (layer, *_) = norms(made("conv", Recipe("ghost", group=4, momentum=0.5)))
    assert (layer.ghost_size, layer.momentum, type(layer)) == (4, 0.5, bn.GhostBatchNorm)
    for affine, trained in (("trained", [True] * 2), ("fixed", [False] * 2), ("absent", [])):
        layer = norms(made("conv", Recipe("batchnorm", affine=affine)))[0]
        assert [parameter.requires_grad for parameter in layer.parameters()] == trained


def test_inputs_are_normalized_first_if_asked():
    model = made("relu", Recipe("batchnorm", first=True), shape=(5, 1, 1))
    assert isinstance(model[0], bn.BatchNorm2d)
    assert model[0].num_features == 5
    assert len(made("relu", NORMALIZED)) == 1


def test_a_block_adds_what_came_in_before_the_activation():
    model = made("residual", NORMALIZED)
    first, second, _ = (module for module in model.modules() if isinstance(module, Block))
    assert isinstance(first.shortcut, nn.Identity)
    assert isinstance(second.shortcut, nn.Conv2d)
    x = torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(first(x), (first.straight(x) + x).relu())
    assert isinstance(first.straight[-1], bn.BatchNorm2d)
    assert len(activations(model)) == 1 + 3 * 2


def test_the_networks_have_every_activation_and_train_at_their_usual_rate():
    assert {network.activation for network in NETWORKS.values()} == set(ACTIVATIONS)
    assert {"conv", "residual"} < set(NETWORKS)
    assert all(network.usual_rate in network.rates for network in NETWORKS.values())
    assert all(name == network.name for name, network in NETWORKS.items())
    assert len(maps(made("deep elu"))) == 11


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("network", ["sigmoid", "conv", "residual"])
def test_any_shape(network, recipe, shape):
    y = made(network, recipe, shape, 7)(torch.randn(4, *shape))
    assert y.shape == (4, 7)
    assert y.isfinite().all()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_ours_computes_what_torch_does(network, place):
    x = torch.randn(60, 1, 8, 8, dtype=torch.float64)
    theirs, ours, fused = (
        made(network, replace(recipe, place=place)).double()
        for recipe in (TORCH, NORMALIZED, Recipe("batchnorm", fused=True))
    )
    for _ in range(2):  # in training, then in evaluation with the statistics of that
        expected = theirs(x)
        for model in (ours, fused):
            torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
            model.eval()
        theirs.eval()


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    expected = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    made("conv")
    torch.testing.assert_close(torch.rand(3), torch.rand(3, generator=expected))
