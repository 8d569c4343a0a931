"""Conversions from and to Keras and Flax, against numbers that these gave themselves.

`data/conventions.json` holds them; `make_conventions.py` wrote it.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import as_numpy, assert_close

import batchnorm as bn
from batchnorm.conventions import from_flax, from_keras, to_flax, to_keras

DATA = json.loads((Path(__file__).parent / "data" / "conventions.json").read_text("utf-8"))
CASES = {f"{case['framework']}, {case['name']}": case for case in DATA["cases"]}
LAYERS = (bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d)


def arrays(value):
    """Return weights or variables of the file as arrays, as the frameworks give them."""
    if isinstance(value, dict):
        return {name: arrays(at) for name, at in value.items()}
    if isinstance(value[0], list):
        return [arrays(at) for at in value]
    return np.array(value, np.float32)


def convert(case, weights="before"):
    """Return the layer that a case is about."""
    convert = from_keras if case["framework"] == "keras" else from_flax
    return convert(case["settings"], arrays(case[weights]))


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


class TestNumbers:
    def test_inference(self, case):
        layer = convert(case, "after").eval()
        y = layer(torch.tensor(case["inputs"][0]))
        assert_close(y, case["y"], torch.float32)

    def test_training(self, case):
        layer = convert(case)
        for x, step in zip(case["inputs"], case["steps"], strict=True):
            assert_close(layer(torch.tensor(x)), step["y"], torch.float32)
            assert_close(layer.running_mean, step["mean"], torch.float32)

    def test_variance_of_a_batch_takes_another_factor(self, case):
        """What the first batch adds is m / (m - 1) times what it adds there."""
        layer = convert(case)
        x = torch.tensor(case["inputs"][0])
        m = x.numel() // layer.num_features
        kept = (1 - layer.momentum) * as_numpy(layer.running_var)
        layer(x)
        added = as_numpy(layer.running_var) - kept
        theirs = as_numpy(case["steps"][0]["var"])
        assert_close(kept + added * (m - 1) / m, theirs, torch.float32)
        if layer.momentum:
            assert np.all(kept + added > theirs)

    def test_there_and_back(self, case):
        """The settings and weights come back as they were, bit by bit."""
        layer = convert(case)
        if case["framework"] == "keras":
            config, weights = to_keras(layer)
            for found, given in zip(weights, arrays(case["before"]), strict=True):
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, given)
        else:
            config, variables = to_flax(layer)
            given = arrays(case["before"])
            assert variables.keys() == given.keys()
            for group, named in given.items():
                assert variables[group].keys() == named.keys()
                for name, array in named.items():
                    assert variables[group][name].dtype == np.float32
                    np.testing.assert_array_equal(variables[group][name], array)
        assert config == {name: case["settings"][name] for name in config}

    def test_between_keras_and_flax(self, case):
        """What one becomes in the other is what the other made of the same case."""
        other = "flax" if case["framework"] == "keras" else "keras"
        (expected,) = [
            at for at in CASES.values() if (at["framework"], at["name"]) == (other, case["name"])
        ]
        settings, weights = (to_flax if other == "flax" else to_keras)(convert(case))
        settings.pop("trainable", None)
        known = {**expected["settings"], "epsilon": case["settings"]["epsilon"]}  # defaults differ
        assert settings == {name: known[name] for name in settings}
        flat = weights if other == "keras" else [a for g in weights.values() for a in g.values()]
        given = arrays(expected["before"])
        given = given if other == "keras" else [a for g in given.values() for a in g.values()]
        assert sorted(array.tolist() for array in flat) == sorted(array.tolist() for array in given)


KERAS = CASES["keras, default"]
FLAX = CASES["flax, default"]
ONES = np.ones(3, np.float32)


class TestSettings:
    def test_a_layer_of_any_rank(self):
        layer = convert(KERAS)
        assert type(layer) is bn.BatchNorm
        assert (layer.channel_dim, layer.momentum, layer.eps) == (-1, 0.01, 0.001)
        assert layer.training
        assert layer.weight.dtype == layer.running_mean.dtype == torch.float32
        assert layer(torch.randn(2, 4, 5, 3)).shape == (2, 4, 5, 3)

    def test_defaults_are_theirs(self):
        assert from_keras({}, [ONES] * 4).extra_repr() == convert(KERAS).extra_repr()
        variables = {"params": {"scale": ONES, "bias": ONES}}
        variables["batch_stats"] = {"mean": ONES, "var": ONES}
        assert from_flax({}, variables).extra_repr() == convert(FLAX).extra_repr()

    def test_momentum_is_one_minus_what_is_written(self):
        for theirs, ours in [(0.99, 0.01), (0.9, 0.1), (0.999, 0.001), (0.3, 0.7), (0, 1), (1, 0)]:
            layer = from_keras({"momentum": theirs}, [ONES] * 4)
            assert layer.momentum == ours
            assert to_keras(layer)[0]["momentum"] == theirs
        assert from_keras({"momentum": np.float32(0.9)}, [ONES] * 4).momentum == 0.1

    def test_a_bias_without_a_weight(self):
        for name in ("keras, no scale", "flax, no scale"):
            layer = convert(CASES[name])
            assert not layer.weight.requires_grad
            assert layer.bias.requires_grad
            assert torch.equal(layer.weight, torch.ones(3))

    def test_a_weight_without_a_bias_and_neither(self):
        for framework in ("keras", "flax"):
            layer = convert(CASES[f"{framework}, no center"])
            assert layer.bias is None
            assert layer.weight.requires_grad
            layer = convert(CASES[f"{framework}, neither"])
            assert (layer.weight, layer.bias, layer.affine) == (None, None, False)

    def test_parameters_that_train_are_kept_even_if_they_are_ones(self):
        config, weights = to_keras(bn.BatchNorm1d(3))
        assert (config["scale"], len(weights)) == (True, 4)

    def test_a_frozen_layer(self):
        layer = from_keras({"trainable": False}, [2 * ONES, ONES, ONES, ONES]).train()
        assert (layer.statistics, layer.update) == ("running", "never")
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        config, weights = to_keras(layer)
        assert (config["trainable"], len(weights)) == (False, 4)
        assert to_keras(bn.FrozenBatchNorm(3))[0]["trainable"] is False
        assert to_keras(bn.FrozenBatchNorm(3, affine=False))[0]["trainable"] is False
        assert to_keras(bn.BatchNorm(3).eval())[0]["trainable"] is True
        with pytest.raises(ValueError, match=r"exclude each other: call layer.requires_grad_"):
            to_keras(layer.requires_grad_())

    def test_flax_that_always_runs_by_its_statistics(self):
        _, variables = to_flax(bn.BatchNorm(3))
        layer = from_flax({"use_running_average": True}, variables)
        assert (layer.statistics, layer.update) == ("running", "never")
        assert layer.weight.requires_grad
        assert to_flax(layer)[0]["use_running_average"] is True
        assert from_flax({"use_running_average": False}, variables).statistics == "mode"
        assert "use_running_average" not in to_flax(bn.BatchNorm(3))[0]

    def test_an_axis_in_a_list_of_one(self):
        assert from_keras({"axis": [3]}, [ONES] * 4).channel_dim == 3
        _, variables = to_flax(bn.BatchNorm(3))
        assert from_flax({"axis": (1,)}, variables).channel_dim == 1

    def test_fields_that_change_no_number(self):
        _, variables = to_flax(bn.BatchNorm(3))
        fields = {"dtype": None, "param_dtype": np.float32, "bias_init": max, "scale_init": max}
        others = {"parent": None, "name": "bn", "axis_name": None, "axis_index_groups": None}
        assert from_flax({**fields, **others}, variables).num_features == 3

    @pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.2), ["leaky_relu", 0.2]])
    def test_an_activation(self, activation):
        layer = from_keras({"activation": activation}, [ONES] * 4)
        expected = activation if isinstance(activation, str) else tuple(activation)
        assert layer.activation == expected == to_keras(layer)[0]["activation"]
        with pytest.raises(ValueError, match=r"activation=.*, and Flax's has none"):
            to_flax(layer)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_layers_of_a_fixed_rank(self, kind):
        config, _ = to_keras(kind(3, eps=1e-4, momentum=0.2))
        assert (config["axis"], config["epsilon"], config["momentum"]) == (1, 1e-4, 0.8)


class TestWeights:
    def test_are_copies(self):
        given = [ONES.copy() for _ in range(4)]
        layer = from_keras({}, given)
        given[0][:] = 7
        _, weights = to_keras(layer)
        weights[3][:] = 7
        assert torch.equal(layer.weight, torch.ones(3))
        assert torch.equal(layer.running_var, torch.ones(3))

    def test_of_other_types(self):
        readonly = np.broadcast_to(np.float64(2), 3)
        layer = from_keras({}, [readonly, [1, 1, 1], ONES.astype(np.float16), torch.ones(3)])
        assert torch.equal(layer.weight, torch.full((3,), 2.0))
        assert {tensor.dtype for tensor in layer.parameters()} == {torch.float32}

    def test_of_a_layer_in_another_type(self):
        layer = bn.BatchNorm(3).to(torch.bfloat16)
        assert {array.dtype for array in to_keras(layer)[1]} == {np.dtype(np.float32)}


class TestErrors:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"renorm": True}, "renorm=True: expected False.*for inference.*set it to False"),
            ({"synchronized": True}, "synchronized=True: expected False.*synchronize the model"),
            ({"gamma_regularizer": "l2"}, "gamma_regularizer='l2': expected None.*to the loss"),
            ({"beta_constraint": {}}, "beta_constraint={}: expected None.*optimizer's step"),
            ({"virtual_batch_size": 8}, "virtual_batch_size=8: expected only axis, .*leave it out"),
            ({"momentum": 1.5}, "momentum is 1.5: expected a number between 0 and 1"),
            ({"momentum": -0.1}, "momentum is -0.1"),
            ({"momentum": math.nan}, "momentum is nan"),
            ({"momentum": None}, "momentum is None"),
            ({"momentum": True}, "momentum is True"),
            ({"epsilon": 0}, "epsilon is 0: expected a positive number.*1e-12"),
            ({"epsilon": "1"}, "epsilon is '1'"),
            ({"axis": [1, 2]}, r"axis is \[1, 2\]: expected one integer.*flatten"),
            ({"axis": 1.0}, "axis is 1.0"),
            ({"axis": None}, "axis is None"),
            ({"scale": None}, "scale is None: expected True or False"),
            ({"trainable": 1}, "trainable is 1: expected True or False"),
            ({"activation": "mish"}, "activation is 'mish': expected None or one of relu"),
        ],
    )
    def test_a_config_that_cannot_be(self, config, message):
        with pytest.raises(ValueError, match=message):
            from_keras(config, [ONES] * 4)

    def test_another_number_of_weights(self):
        with pytest.raises(ValueError, match=r"weights are 3 arrays: expected 4, gamma, beta, mov"):
            from_keras({}, [ONES] * 3)
        with pytest.raises(ValueError, match=r"are 4 arrays: expected 3, gamma, .* center=False"):
            from_keras({"center": False}, [ONES] * 4)

    @pytest.mark.parametrize("odd", [np.ones(4), np.ones((1, 3)), np.ones(())])
    def test_shapes_that_disagree(self, odd):
        with pytest.raises(ValueError, match=r"gamma \(3,\), beta .*: expected \(C,\) for all"):
            from_keras({}, [ONES, odd, ONES, ONES])

    @pytest.mark.parametrize("shape", [(), (1, 3)])
    def test_shapes_that_are_not_of_channels(self, shape):
        with pytest.raises(ValueError, match=r"expected \(C,\) for all"):
            from_keras({}, [np.ones(shape)] * 4)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"axis_name": "batch"}, "settings has axis_name='batch': expected None.*synchronize"),
            ({"center": True}, "center=True: expected only axis, momentum, epsilon, use_bias"),
            ({"axis": (1, 2)}, r"axis is \(1, 2\): expected one integer"),
            ({"momentum": 2}, "momentum is 2"),
            ({"use_scale": False}, "variables hold .*params/scale.*: expected params/bias, batch"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message):
        _, variables = to_flax(bn.BatchNorm(3))
        with pytest.raises(ValueError, match=message):
            from_flax(settings, variables)

    def test_variables_that_are_not_all_there(self):
        _, variables = to_flax(bn.BatchNorm(3))
        del variables["batch_stats"]["var"]
        with pytest.raises(ValueError, match=r"variables hold batch_stats/mean, .*: expected"):
            from_flax({}, variables)
        with pytest.raises(ValueError, match="variables hold nothing: expected params/scale"):
            from_flax({}, {})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"momentum": None}, "momentum=None.*set it to a number"),
            ({"track_running_stats": False}, "track_running_stats=False"),
            ({"correction": 1}, "correction=1, .*: set it to 0, which changes nothing in inf"),
            ({"ghost_size": 4}, "ghost_size=4, .*: set it to None"),
            ({"process_group": "world"}, "process_group='world', .*: set it to None"),
            ({"statistics": "batch"}, "statistics='batch', .*: set it to 'mode'"),
            ({"statistics": "running"}, "statistics='running', .*: set it to 'mode'"),
            ({"update": "never"}, "update='never', .*: set it to 'training'"),
            ({"momentum": 1.5}, "momentum is 1.5"),
        ],
    )
    @pytest.mark.parametrize("convert", [to_keras, to_flax])
    def test_a_layer_that_cannot_be(self, convert, settings, message):
        with pytest.raises(ValueError, match=message):
            convert(bn.BatchNorm(3, **settings))

    @pytest.mark.parametrize("convert", [to_keras, to_flax])
    def test_another_kind_of_layer(self, convert):
        for layer in (bn.BatchRenorm(3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)):
            with pytest.raises(TypeError, match=r"layer is a .*: expected a BatchNorm that is no"):
                convert(layer)
