"""The Keras layer beside `keras.layers.BatchNormalization`."""

import builtins
import copy
import os
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch
from support import ACTIVATIONS, activate, assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm.keras
from batchnorm.conventions import from_keras, to_keras
from batchnorm.keras import BatchNormalization

THEIRS, OURS = keras.layers.BatchNormalization, BatchNormalization

#: Shape of a batch and settings.
CASES = {
    "dense": ((16, 5), {}),
    "settings": ((16, 5), {"momentum": 0.6, "epsilon": 1e-5}),
    "sequences": ((6, 7, 5), {"axis": -1}),
    "images": ((4, 6, 7, 5), {"momentum": 0.9}),
    "channels first": ((4, 5, 6, 7), {"axis": 1}),
    "channels at -3": ((4, 5, 6, 7), {"axis": -3}),
    "channels in front": ((5, 40), {"axis": 0}),
    "volumes": ((2, 3, 4, 5, 4), {"axis": 3}),
    "no center": ((16, 5), {"center": False}),
    "no scale": ((16, 5), {"scale": False}),
    "neither": ((16, 5), {"center": False, "scale": False}),
    "renormalized": ((16, 5), {"renorm": True, "renorm_momentum": 0.5}),
    "renormalized, clipped": (
        (4, 6, 5),
        {
            "renorm": True,
            "renorm_clipping": {"rmin": 0.7, "rmax": 1.4, "dmax": 0.2},
            "scale": False,
        },
    ),
    "renormalized, clipped on one side": (
        (16, 5),
        {"renorm": True, "renorm_clipping": {"rmax": 1.1}, "center": False, "axis": 1},
    ),
}

#: The numbers of Keras itself, which squares values before it subtracts, are this far from exact.
KERAS = 2.0


def pair(shape, settings):
    """Return our layer and Keras's with the same random weights."""
    layers = [kind(**settings) for kind in (OURS, THEIRS)]
    for layer in layers:
        layer.build(shape)
    weights = [np.random.default_rng(1).uniform(0.5, 2, w.shape) for w in layers[0].weights]
    for layer in layers:
        layer.set_weights(weights)
    return layers


def statistics(layer):
    return [keras.ops.convert_to_numpy(weight) for weight in layer.non_trainable_weights]


def assert_same_statistics(ours, theirs):
    for found, expected in zip(statistics(ours), statistics(theirs), strict=True):
        assert_close(found, expected, torch.float32, scale=KERAS)


def batch(shape, mean=0.7):
    return torch.randn(shape) * 2 + mean


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


class TestNumbers:
    def test_training_and_what_follows_it(self, case):
        shape, settings = case
        ours, theirs = pair(shape, settings)
        for step in range(4):
            x = batch(shape, mean=step)
            assert_close(
                ours(x, training=True), theirs(x, training=True), torch.float32, scale=KERAS
            )
            assert_same_statistics(ours, theirs)
        assert_close(ours(x), theirs(x), torch.float32, scale=KERAS)

    def test_inference(self, case):
        shape, settings = case
        ours, theirs = pair(shape, settings)
        x, before = batch(shape), ours.get_weights()
        for training in (False, None):
            y = ours(x, training=training)
            assert_close(y, theirs(x, training=training), torch.float32, scale=KERAS)
        for found, expected in zip(ours.get_weights(), before, strict=True):
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("training", [True, False])
    def test_gradients(self, case, training):
        shape, settings = case
        ours, theirs = pair(shape, settings)
        x, dy = batch(shape), torch.randn(shape)
        found, expected = [], []
        for layer, gradients in ((ours, found), (theirs, expected)):
            leaf = x.clone().requires_grad_()
            learned = [weight.value for weight in layer.trainable_weights]
            gradients += torch.autograd.grad(layer(leaf, training=training), [leaf, *learned], dy)
        assert len(found) == len(expected)
        for ours_, theirs_ in zip(found, expected, strict=True):
            assert_close(ours_, theirs_, torch.float32, "sum", KERAS)

    def test_the_moving_variance_takes_the_biased_one(self):
        """Keras's own formula, of numbers that are easy."""
        layer = OURS(momentum=0.9)
        layer(torch.tensor([[3.0], [5], [8], [9], [11], [24]]), training=True)
        mean, variance = statistics(layer)
        assert_close(mean, [0.9 * 0 + 0.1 * 10], torch.float32)
        assert_close(variance, [0.9 * 1 + 0.1 * 46], torch.float32)

    def test_digits_that_keras_loses(self):
        x = torch.randn(512, 3) + 1e4
        exact = (x.double() - x.double().mean(0)) / (x.double().var(0, correction=0) + 1e-3).sqrt()
        errors = [(layer(x, training=True) - exact).abs().max() for layer in pair((512, 3), PLAIN)]
        assert errors[0] < 1e-6
        assert errors[1] > 1e-1

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("training", [True, False])
    def test_an_activation(self, activation, training):
        x = batch((8, 5))
        plain, fused = OURS(), OURS(activation=activation)
        expected = activate(activation, plain(x, training=training))
        assert_close(fused(x, training=training), expected, torch.float32)

    def test_two_forwards_and_one_backward(self):
        ours, theirs = pair((8, 5), {})
        x, g = batch((8, 5)), torch.randn(8, 5)
        gradients = []
        for layer in (ours, theirs):
            y = layer(x, training=True) + layer(x + 1, training=True)
            gradients.append(torch.autograd.grad(y, layer.gamma.value, g)[0])
        assert_close(*gradients, torch.float32, "sum", KERAS)


PLAIN = {"center": False, "scale": False}


class TestMask:
    @pytest.mark.parametrize(
        ("shape", "settings"),
        [
            ((8, 5), {}),
            ((6, 7, 5), {}),
            ((6, 7, 5), {"renorm": True}),
            ((3, 4, 6, 5), {"momentum": 0.5}),
            ((6, 5, 7), {"axis": 1}),  # the mask goes over the channels: each has its positions
            ((5, 6, 7), {"axis": 0, "scale": False}),
            ((6, 5, 7), {"axis": 1, "renorm": True}),
        ],
    )
    def test_numbers(self, shape, settings):
        ours, theirs = pair(shape, settings)
        for _ in range(3):
            x = batch(shape)
            mask = torch.rand(shape[:-1]) < 0.6
            y = ours(x, training=True, mask=mask)
            assert_close(y, theirs(x, training=True, mask=mask), torch.float32, scale=KERAS)
            assert_same_statistics(ours, theirs)

    def test_gradients(self):
        ours, theirs = pair((6, 7, 5), {})
        x, dy, mask = batch((6, 7, 5)), torch.randn(6, 7, 5), torch.rand(6, 7) < 0.6
        gradients = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf, training=True, mask=mask)
            gradients.append(torch.autograd.grad(y, [leaf, layer.gamma.value], dy))
        for found, expected in zip(*gradients, strict=True):
            assert_close(found, expected, torch.float32, "sum", KERAS)

    def test_of_one_for_all_channels(self):
        """A mask of size 1 along the axis leaves the same positions to each, at one go."""
        ours, theirs = pair((6, 5, 7), {"axis": 1})
        x, mask = batch((6, 5, 7)), torch.tensor([[1], [0], [1], [1], [0], [1]])
        y = ours(x, training=True, mask=mask)
        assert_close(y, theirs(x, training=True, mask=mask), torch.float32, scale=KERAS)
        assert_same_statistics(ours, theirs)

    def test_is_the_batch_without_the_padding(self):
        layer, alone = pair((6, 7, 5), {})[0], pair((6, 7, 5), {})[0]
        x, mask = batch((6, 7, 5)), torch.rand(6, 7) < 0.6
        y = layer(torch.where(mask[..., None], x, torch.nan), training=True, mask=mask)
        assert_close(y[mask], alone(x[mask][None], training=True)[0], torch.float32)
        assert y.isfinite().all()
        assert_same_statistics(layer, alone)

    def test_an_all_masked_batch_moves_nothing(self):
        """Keras drags the moving statistics towards 0: here they stay as they are."""
        ours, theirs = pair((4, 3), {"momentum": 0.5})
        before = statistics(ours)
        mask = torch.zeros(4, dtype=torch.bool)
        for layer in (ours, theirs):
            layer(batch((4, 3)), training=True, mask=mask)
        for kept, dragged, start in zip(statistics(ours), statistics(theirs), before, strict=True):
            np.testing.assert_array_equal(kept, start)
            assert_close(dragged, start / 2, torch.float32)

    def test_an_all_masked_channel_moves_nothing(self):
        ours, theirs = pair((6, 5, 7), {"axis": 1})
        before = statistics(ours)
        mask = torch.rand(6, 5) < 0.7
        mask[:, 2] = False
        x = batch((6, 5, 7))
        for layer in (ours, theirs):
            layer(x, training=True, mask=mask)
        others = [0, 1, 3, 4]
        for found, keras_, start in zip(statistics(ours), statistics(theirs), before, strict=True):
            assert found[2] == start[2]
            assert keras_[2] < start[2]
            assert_close(found[others], keras_[others], torch.float32, scale=KERAS)

    @pytest.mark.parametrize("mask", [torch.ones(6, 5, 7), torch.ones(6)])
    @pytest.mark.parametrize("training", [True, False])
    def test_of_another_rank(self, mask, training):
        with pytest.raises(ValueError, match=r"expected the inputs' size.*without its last dimens"):
            OURS()(batch((6, 5, 7)), training=training, mask=mask)

    def test_comes_from_other_layers(self):
        """An embedding tells what is padding; the layer hears it, and hands it on."""
        words = np.array([[3, 1, 0, 0], [2, 2, 1, 0]])
        embedding = keras.layers.Embedding(5, 3, mask_zero=True)
        ours, theirs = pair((2, 4, 3), {"momentum": 0.0})
        x = embedding(words)
        y = ours(x, training=True)
        assert_close(y, theirs(x, training=True), torch.float32, scale=KERAS)
        mask = torch.as_tensor(words != 0)
        assert_close(statistics(ours)[0], x[mask].mean(0), torch.float32)
        assert torch.equal(torch.as_tensor(y._keras_mask), mask)


class TestSpoiledBatches:
    """What the moving statistics do not follow, and where they would go in Keras."""

    @pytest.mark.parametrize("settings", [{}, {"renorm": True}])
    @pytest.mark.parametrize("kind", ["one value", "empty", "not finite"])
    def test_leave_the_statistics(self, kind, settings):
        x = {
            "one value": batch((1, 3)),
            "empty": torch.empty(0, 3),
            "not finite": torch.tensor([[1.0, 2, 3], [torch.inf, 2, 3]]),
        }[kind]
        ours, theirs = pair((None, 3), settings)
        before = statistics(ours)
        y = ours(x, training=True)
        assert y.shape == x.shape
        for found, expected in zip(statistics(ours), before, strict=True):
            np.testing.assert_array_equal(found, expected)
        theirs(x, training=True)
        spoiled = zip(statistics(theirs), before, strict=True)
        assert not all(np.array_equal(found, start) for found, start in spoiled)

    def test_one_value_becomes_beta_as_in_keras(self):
        ours, theirs = pair((1, 3), {})
        x = batch((1, 3))
        assert torch.equal(ours(x, training=True), ours.beta.value[None])
        assert_close(theirs(x, training=True), ours.beta.value[None], torch.float32)


#: What computes a call again in the backward pass.
CHECKPOINTS = {
    "non-reentrant": lambda call: lambda x: checkpoint(call, x, use_reentrant=False),
    "reentrant": lambda call: lambda x: checkpoint(call, x, use_reentrant=True),
    "of Keras": keras.remat,
}


class TestCheckpoint:
    """A recomputation gives the gradients of its call, and moves no statistics."""

    SETTINGS = (
        {},
        {"renorm": True, "renorm_momentum": 0.5, "momentum": 0.5},
        {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.3}, "activation": "silu"},
    )

    @staticmethod
    def layer(shape, settings):
        layer = OURS(**settings)
        layer.build(shape)
        weights = [np.random.default_rng(1).uniform(0.5, 2, w.shape) for w in layer.weights]
        layer.set_weights(weights)
        return layer

    @staticmethod
    def run(layer, around, xs, dys, **given):
        """Return the gradients and the statistics after several calls and one backward pass."""
        xs = xs.clone().requires_grad_()
        call = around(lambda x: layer(x, training=True, **given))
        loss = sum((call(x) * dy).sum() for x, dy in zip(xs, dys, strict=True))
        before = statistics(layer)
        learned = [weight.value for weight in layer.trainable_weights]
        for leaf in learned:
            leaf.grad = None
        loss.backward()
        for found, expected in zip(statistics(layer), before, strict=True):
            np.testing.assert_array_equal(found, expected)
        return [xs.grad, *(leaf.grad for leaf in learned)], before

    def check(self, settings, around, shape, order, **given):
        xs = batch((3, *shape))[order]
        dys = torch.randn(xs.shape)
        found, expected = (
            self.run(self.layer(shape, settings), way, xs, dys, **given)
            for way in (around, lambda call: call)
        )
        for ours, truth in zip(found[0], expected[0], strict=True):
            torch.testing.assert_close(ours, truth)  # which are summed in another order
        for ours, truth in zip(found[1], expected[1], strict=True):
            np.testing.assert_array_equal(ours, truth)

    @pytest.mark.parametrize("around", CHECKPOINTS.values(), ids=CHECKPOINTS)
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_one_call(self, settings, around):
        self.check(settings, around, (8, 5), [0])

    @pytest.mark.parametrize("around", CHECKPOINTS.values(), ids=CHECKPOINTS)
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_several_calls_also_of_one_batch(self, settings, around):
        self.check(settings, around, (8, 5), [0, 1, 0, 2, 0])

    @pytest.mark.parametrize("around", CHECKPOINTS.values(), ids=CHECKPOINTS)
    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("axis", [1, -1])
    def test_a_mask(self, axis, settings, around):
        mask = torch.rand(6, 5) < 0.7
        self.check({**settings, "axis": axis}, around, (6, 5, 4), [0, 1], mask=mask)

    def test_gradients_are_those_of_keras(self):
        xs, dys = batch((1, 16, 5)), torch.randn(1, 16, 5)
        ours, theirs = pair((16, 5), {"renorm": True})
        found = self.run(ours, CHECKPOINTS["non-reentrant"], xs, dys)
        expected = self.run(theirs, lambda call: call, xs, dys)
        for gradient, truth in zip(found[0], expected[0], strict=True):
            assert_close(gradient, truth, torch.float32, "sum", KERAS)

    @pytest.mark.parametrize("mode", ["full", "activations"])
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_a_scope_of_keras(self, settings, mode):
        xs, dys = batch((2, 8, 5)), torch.randn(2, 8, 5)
        plain = self.run(self.layer((8, 5), settings), lambda call: call, xs, dys)
        with keras.RematScope(mode=mode):
            layer = self.layer((8, 5), settings)
        scoped = self.run(layer, lambda call: call, xs, dys)
        for found, expected in zip(scoped[0] + scoped[1], plain[0] + plain[1], strict=True):
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_call_that_is_long_ago_says_so(self, use_reentrant):
        layer = pair((8, 3), {"renorm": True, "name": "far"})[0]
        x = batch((8, 3)).requires_grad_()
        y = checkpoint(lambda x: layer(x, training=True), x, use_reentrant=use_reentrant)
        for _ in range(32):
            layer(batch((8, 3)), training=True)
        with pytest.raises(RuntimeError, match=r"'far' that is not among the last 32"):
            y.backward(torch.randn(8, 3))

    def test_what_is_remembered_goes_into_no_copy(self, tmp_path):
        x = batch((8, 5))
        model = keras.Sequential([keras.Input((5,)), OURS(renorm=True)])
        model(x, training=True)
        assert len(model.layers[0]._recent) == 1
        model.save(tmp_path / "model.keras")
        saved = keras.saving.load_model(tmp_path / "model.keras")
        for twin in (saved, copy.deepcopy(model)):
            assert len(twin.layers[0]._recent) == 0
            assert torch.equal(twin(x), model(x))
        assert len(keras.models.clone_model(model).layers[0]._recent) == 0

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_compiled_renormalization_says_so(self, use_reentrant):
        layer = pair((8, 5), {"renorm": True})[0]
        compiled = torch.compile(lambda x: layer(x, training=True), backend="aot_eager")
        y = checkpoint(compiled, batch((8, 5)).requires_grad_(), use_reentrant=use_reentrant)
        with pytest.raises(RuntimeError, match="do not compile it"):
            y.backward(torch.randn(8, 5))


class TestConventions:
    def test_is_a_layer_of_keras(self):
        assert issubclass(OURS, THEIRS)
        assert OURS().supports_masking

    def test_names_and_order_of_the_weights(self, case):
        shape, settings = case
        ours, theirs = pair(shape, settings)
        assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
        assert [w.shape for w in ours.weights] == [w.shape for w in theirs.weights]
        assert len(ours.trainable_weights) == len(theirs.trainable_weights)

    def test_arguments_by_position(self):
        initializers = ["ones", "zeros", "ones", "zeros"]
        given = [1, 0.5, 1e-4, True, True, *initializers, "l1", "l2", "non_neg", "unit_norm"]
        ours, theirs = OURS(*given, name="a"), THEIRS(*given, name="a")
        assert ours.get_config() == {**theirs.get_config(), "activation": None}
        for layer in (ours, theirs):
            layer.build((8, 3))
        for found, expected in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_regularizers_count(self):
        ours, theirs = pair((8, 5), {"gamma_regularizer": "l2", "beta_regularizer": "l1"})
        for found, expected in zip(ours.losses, theirs.losses, strict=True):
            assert float(found.detach()) == float(expected.detach()) > 0

    def test_weights_are_exchanged(self):
        ours, theirs = pair((8, 5), {})
        x = batch((8, 5))
        ours(x, training=True)
        theirs.set_weights(ours.get_weights())
        assert_close(ours(x), theirs(x), torch.float32, scale=KERAS)
        theirs(x, training=True)
        ours.set_weights(theirs.get_weights())
        assert_close(ours(x), theirs(x), torch.float32, scale=KERAS)

    def test_a_layer_that_is_not_trainable_infers(self):
        ours, theirs = pair((8, 5), {})
        ours.trainable = theirs.trainable = False
        x, before = batch((8, 5)), ours.get_weights()
        y = ours(x, training=True)
        assert torch.equal(y, ours(x, training=False))
        assert_close(y, theirs(x, training=True), torch.float32, scale=KERAS)
        assert not ours.trainable_weights
        for found, expected in zip(ours.get_weights(), before, strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_stateless_calls_leave_the_layer(self):
        ours, theirs = pair((8, 5), {})
        x, before = batch((8, 5)), statistics(ours)
        results = []
        for layer in (ours, theirs):
            values = [
                [v.value for v in vs]
                for vs in (layer.trainable_variables, layer.non_trainable_variables)
            ]
            results.append(layer.stateless_call(*values, x, training=True))
        assert_close(results[0][0], results[1][0], torch.float32, scale=KERAS)
        for found, expected in zip(results[0][1], results[1][1], strict=True):
            assert_close(found, expected, torch.float32, scale=KERAS)
        for found, expected in zip(statistics(ours), before, strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_shapes_are_known_beforehand(self):
        layer = OURS(axis=1)
        assert layer(keras.Input((5, 7))).shape == (None, 5, 7)
        with pytest.raises(ValueError, match="out of bounds"):
            layer.compute_output_shape((3,))

    @pytest.mark.parametrize("settings", [{"activation": "mish"}, {"synchronized": True}])
    def test_settings_that_cannot_be(self, settings):
        with pytest.raises(ValueError, match=r"mish|synchronized"):
            OURS(**settings)


class TestTypes:
    @pytest.mark.parametrize(
        ("policy", "dtype"),
        [
            ("mixed_float16", torch.float16),
            ("mixed_bfloat16", torch.bfloat16),
            ("float16", torch.float16),
            ("bfloat16", torch.bfloat16),
        ],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_half(self, policy, dtype, training):
        ours, theirs = pair((16, 5), {"dtype": policy})
        x = batch((16, 5))
        y = ours(x, training=training)
        assert y.dtype == dtype
        assert_close(y, theirs(x, training=training), dtype, scale=2.0)
        assert [w.dtype for w in ours.trainable_weights] == [
            w.dtype for w in theirs.trainable_weights
        ]
        assert {w.dtype for w in ours.non_trainable_weights} == {"float32"}

    def test_double(self):
        ours, _ = pair((16, 5), {"dtype": "float64"})
        x = batch((16, 5)).double()
        assert {w.dtype for w in ours.weights} == {"float64"}
        xhat = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt()
        y = ours(x, training=True)
        assert_close(y, xhat * ours.gamma.value + ours.beta.value, torch.float64)

    def test_inputs_of_another_type_than_the_layer(self):
        for x in (torch.arange(24).reshape(8, 3), batch((8, 3)).bfloat16(), batch((8, 3)).double()):
            ours, theirs = pair((8, 3), {"autocast": False})
            y = ours(x, training=True)
            assert y.dtype == torch.float32
            assert_close(y, theirs(x, training=True), torch.float32, scale=KERAS)
            assert_same_statistics(ours, theirs)

    def test_arrays(self):
        ours, theirs = pair((8, 3), {})
        x = np.random.default_rng(0).normal(size=(8, 3))
        assert_close(ours(x), theirs(x), torch.float32, scale=KERAS)


class TestSaving:
    SETTINGS = (
        {},
        {"axis": 1, "momentum": 0.5, "epsilon": 1e-5, "center": False},
        {"activation": ("leaky_relu", 0.2), "gamma_regularizer": "l2"},
        {"gamma_initializer": keras.initializers.Constant(0.5), "dtype": "mixed_bfloat16"},
        {"renorm": True, "renorm_clipping": {"rmax": 2.0}},
    )

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_config(self, settings):
        layer = OURS(**settings)
        again = OURS.from_config(layer.get_config())
        assert again.get_config() == layer.get_config()
        assert again.activation == layer.activation
        written = keras.saving.serialize_keras_object(layer)
        assert written["registered_name"] == "batchnorm>BatchNormalization"
        assert type(keras.saving.deserialize_keras_object(written)) is OURS

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_file(self, settings, tmp_path):
        x = batch((8, 5))
        model = keras.Sequential([keras.Input((5,)), OURS(**settings), keras.layers.Dense(2)])
        model(x, training=True)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        assert type(again.layers[0]) is OURS
        assert again.layers[0].activation == model.layers[0].activation
        assert torch.equal(again(x), model(x))

    def test_weights_file_of_keras_itself(self, tmp_path):
        """What was trained with Keras's layer goes on with ours."""
        x = batch((8, 5))
        models = [keras.Sequential([keras.Input((5,)), kind(name="bn")]) for kind in (THEIRS, OURS)]
        models[0](x, training=True)
        models[0].save_weights(tmp_path / "model.weights.h5")
        models[1].load_weights(tmp_path / "model.weights.h5")
        assert_close(models[1](x), models[0](x), torch.float32, scale=KERAS)

    def test_clones(self):
        model = keras.Sequential([keras.Input((5,)), OURS(activation="relu")])
        assert keras.models.clone_model(model).layers[0].activation == "relu"
        assert copy.deepcopy(model).layers[0].activation == "relu"


class TestFit:
    """Real training by `fit`: the same network, once with each layer, from the same seed."""

    @staticmethod
    def compare(build, x, y, **settings):
        histories, predictions = [], []
        for kind in (OURS, THEIRS):
            keras.utils.set_random_seed(0)
            model = build(kind)
            # Adam would scale up the rounding errors of gradients that are 0
            model.compile(keras.optimizers.SGD(0.02), "mse", metrics=["mae"])
            done = model.fit(
                x, y, batch_size=16, epochs=4, validation_split=0.25, verbose=0, **settings
            )
            histories.append(done.history)
            predictions.append(model.predict(x, verbose=0))
        assert histories[0]["loss"][-1] < 0.8 * histories[0]["loss"][0]
        for name, expected in histories[1].items():
            np.testing.assert_allclose(histories[0][name], expected, rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(*predictions, rtol=0, atol=1e-5)

    def test_dense(self):
        rng = np.random.default_rng(0)
        x = rng.normal(3, 5, (128, 6)).astype(np.float32)
        y = np.tanh(x[:, :1] - 3) + 0.3 * x[:, 1:2]

        def build(kind):
            layers = [
                keras.layers.Dense(12, use_bias=False),
                kind(momentum=0.8),
                keras.layers.Activation("relu"),
            ]
            return keras.Sequential([keras.Input((6,)), kind(), *layers, keras.layers.Dense(1)])

        self.compare(build, x, y)

    def test_images(self):
        rng = np.random.default_rng(0)
        x = rng.normal(1, 2, (64, 8, 8, 2)).astype(np.float32)
        y = x.mean((1, 2, 3), keepdims=True)[:, 0, 0] * 5

        def build(kind):
            i = keras.Input((8, 8, 2))
            h = kind(momentum=0.5)(keras.layers.Conv2D(6, 3, use_bias=False)(i))
            h = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(h))
            return keras.Model(i, keras.layers.Dense(1)(h))

        self.compare(build, x, y)

    def test_padded_sequences(self):
        rng = np.random.default_rng(0)
        x = rng.integers(1, 20, (96, 9)) * (np.arange(9) < rng.integers(2, 10, (96, 1)))
        y = (x > 10).sum(1, keepdims=True) / 4.0

        def build(kind):
            i = keras.Input((9,), dtype="int32")
            h = kind(momentum=0.5)(keras.layers.Embedding(20, 8, mask_zero=True)(i))
            h = keras.layers.GlobalAveragePooling1D()(h)  # of what is not masked
            return keras.Model(i, keras.layers.Dense(1)(h))

        self.compare(build, x, y)


class TestConversion:
    """`from_keras` and `to_keras` on layers of Keras itself."""

    @pytest.mark.parametrize("kind", [OURS, THEIRS])
    @pytest.mark.parametrize("settings", [{}, {"center": False}, {"scale": False}, {"axis": 1}])
    def test_there_and_back(self, kind, settings):
        x = batch((8, 5))
        layer = kind(**settings)
        layer(x, training=True)
        ours = from_keras(layer.get_config(), layer.get_weights())
        assert_close(ours.eval()(x), layer(x), torch.float32, scale=KERAS)
        config, weights = to_keras(ours)
        again = kind.from_config(config)
        again.build((None, 5))
        again.set_weights(weights)
        assert torch.equal(again(x), layer(x))

    def test_an_activation(self):
        layer = OURS(activation=("elu", 0.5))
        x = batch((8, 5))
        y = layer(x)
        ours = from_keras(layer.get_config(), layer.get_weights()).eval()
        assert_close(ours(x), y, torch.float32)
        assert OURS.from_config(to_keras(ours)[0]).activation == ("elu", 0.5)


class TestImport:
    PATH = batchnorm.keras.__file__

    def test_the_package_does_not_import_keras(self):
        code = "import batchnorm, batchnorm.conventions, sys; print('keras' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False"

    def test_without_keras(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "keras", None)
        with pytest.raises(ImportError, match=r'needs Keras: pip install "batchnorm\[keras\]"'):
            runpy.run_path(self.PATH)

    def test_without_the_backend_of_keras(self, monkeypatch):
        """Keras's default is TensorFlow, and to import Keras without it is an error."""
        real = builtins.__import__

        def fail(name, *args, **kwargs):
            if name == "keras":
                raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fail)
        with pytest.raises(ImportError, match=r"'tensorflow'\): set .*KERAS_BACKEND=torch before"):
            runpy.run_path(self.PATH)

    def test_with_another_backend(self, monkeypatch):
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        with pytest.raises(RuntimeError, match=r"runs on jax: set .*KERAS_BACKEND=torch before"):
            runpy.run_path(self.PATH)

    def test_another_backend_in_earnest(self):
        environment = {**os.environ, "KERAS_BACKEND": "numpy"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", "import batchnorm.keras"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 1
        # it may not even be there: that of NumPy needs JAX
        assert "set the environment variable KERAS_BACKEND=torch before" in done.stderr
