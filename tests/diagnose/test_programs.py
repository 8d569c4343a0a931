"""Shift and adaptation of exported models: as of the modules that they were."""

import copy

import numpy as np
import onnx
import pytest
import torch
from models.exported import SHAPE, batch_may_vary, net, trained
from models.test_programs import Several, graph, parsed, program
from onnx import numpy_helper
from support import assert_close
from torch import nn

import batchnorm as bn
from batchnorm.diagnose import programs
from batchnorm.diagnose.programs import adapt_model, shift_of_model
from batchnorm.models.files import FileError
from batchnorm.models.programs.calibrating import statistics_of

KINDS = {"pt2": program, "onnx": graph}
NAMES = ["bn", "body.2", "last"]


def calibrated():
    """Return the small network with the statistics of normal pictures, and such pictures."""
    module = net()
    bn.calibrate(module, torch.randn(2000, *SHAPE))
    return module


def exported(kind, module):
    """Return what the small network is as a file, with the statistics of a module."""
    model = KINDS[kind]()
    if kind == "pt2":
        for name, value in module.state_dict().items():
            model.state_dict[name].data.copy_(value)
        return model
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in module.named_buffers():
        if name in tensors:
            tensors[name].CopyFrom(numpy_helper.from_array(value.numpy(), name))
    return model


def assert_same_shift(actual, expected):
    """Assert that two reports say the same, up to the rounding of the runtimes."""
    close = {"rel": 1e-4, "abs": 1e-6}
    assert (actual.shifted, actual.kind, actual.examples) == (
        expected.shifted, expected.kind, expected.examples
    )  # fmt: skip
    assert (actual.score, actual.noise, actual.p_value) == pytest.approx(
        (expected.score, expected.noise, expected.p_value), **close
    )
    assert list(actual.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        found = actual.layers[name]
        assert vars(found) == {
            name: value if isinstance(value, bool | tuple) else pytest.approx(value, **close)
            for name, value in vars(layer).items()
        }
    places = {(c.layer, c.channel): c for c in actual.channels}
    for channel in expected.channels:
        found = places[channel.layer, channel.channel]
        assert found[2:] == pytest.approx(channel[2:], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
class TestShift:
    @pytest.mark.parametrize("moved", [0, 0.2, 2])
    @pytest.mark.parametrize("size", [200, 64, 1])
    def test_as_the_module_that_it_was(self, kind, moved, size):
        module = calibrated()
        x = torch.randn(200 if size > 1 else 30, *SHAPE) * (1 + moved) + moved
        found = shift_of_model(exported(kind, module), (x,), size)
        if kind == "onnx":  # which does not have it
            for name in NAMES:
                module.get_submodule(name).num_batches_tracked.zero_()
        assert_same_shift(found, bn.measure_shift(module, x.split(size)))
        assert found.shifted == (moved > 0) or size == 1
        assert list(found.layers) == NAMES

    def test_the_model_stays_as_it_is(self, kind):
        model = KINDS[kind]()
        before = (
            {name: value.clone() for name, value in model.state_dict.items()}
            if kind == "pt2" else model.SerializeToString(deterministic=True)
        )  # fmt: skip
        shift_of_model(model, (torch.randn(20, *SHAPE),), 8)
        if kind == "pt2":
            torch.testing.assert_close(model.state_dict, before, rtol=0, atol=0)
        else:
            assert model.SerializeToString(deterministic=True) == before

    def test_settings_count(self, kind):
        module, x = calibrated(), torch.randn(40, *SHAPE) + 0.05
        model = exported(kind, module)
        if kind == "onnx":
            for name in NAMES:
                module.get_submodule(name).num_batches_tracked.zero_()
        settings = {"max_batches": 3, "train_batch_size": 4, "alpha": 0.9, "tolerance": 1e-6}
        found = shift_of_model(model, (x,), 10, **settings)
        assert found.examples == 30
        assert_same_shift(found, bn.measure_shift(module, x.split(10), **settings))

    def test_examples_that_are_not_finite_do_not_count(self, kind):
        module, x = calibrated(), torch.randn(40, *SHAPE)
        x[7] = torch.inf
        found = shift_of_model(exported(kind, module), (x,), 40)
        assert found.examples == 39
        assert not found.shifted

    def test_too_few_examples(self, kind):
        with pytest.raises(FileError, match="'bn': it saw 1 finite examples"):
            shift_of_model(KINDS[kind](), (torch.randn(1, *SHAPE),), 8)


class TestShiftOfPrograms:
    def test_the_noise_is_that_of_the_training_run(self):
        module = net()
        for name, momentum, batches in zip(NAMES, (0.1, 0.01, None), (3, 1000, 50), strict=True):
            layer = module.get_submodule(name)
            layer.momentum, layer.num_batches_tracked = momentum, torch.tensor(batches)
        x = torch.randn(30, *SHAPE)
        found = shift_of_model(batch_may_vary(module), (x,), 30)
        module.last.momentum = 0.1  # which a program does not tell from what is not known
        assert_same_shift(found, bn.measure_shift(module, x))

    def test_layers_of_all_sorts(self):
        module, x = trained(Several()), torch.randn(30, 3, 4, 4)
        made = torch.export.export(
            copy.deepcopy(module), (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        found = shift_of_model(made, (x,), 10)
        expected = bn.measure_shift(module, x.split(10))
        assert set(found.left.values()) == {
            "it has no running statistics",
            "its statistics are computed in the program, or in a branch",
        }
        assert list(found.layers) == ["shared", "small"]
        assert_same_shift(found, expected)

    def test_a_layer_alone(self):
        module, x = trained(nn.BatchNorm1d(3)), torch.randn(30, 3)
        made = torch.export.export(
            module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        found = shift_of_model(made, (x,), 10)
        assert list(found.layers) == [""]
        assert_same_shift(found, bn.measure_shift(module, x.split(10)))
        assert adapt_model(made, (x,), 30).done == [""]

    def test_a_second_input_is_no_label(self):
        class Rows(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x, rows):
                return self.bn(x)[rows]

        x, rows = torch.randn(30, 3), torch.arange(30)
        batch = torch.export.Dim("batch")
        made = torch.export.export(
            Rows().eval(), (x, rows), dynamic_shapes=({0: batch}, {0: batch})
        )
        report = adapt_model(made, (x + 1, rows), 30)
        assert report.gain is None
        assert report.done == ["bn"]

    def test_a_fixed_number_of_examples(self):
        found = shift_of_model(program(dynamic=False), (torch.randn(9, *SHAPE),), 2)
        assert found.examples == 8


class TestShiftOfOnnx:
    @pytest.mark.parametrize("opset", [9, 15, 18, 21])
    def test_every_version(self, opset):
        model = parsed(
            "h = BatchNormalization <epsilon = 0.5, momentum = 0.5> (x, ones, zeros, half, ones)"
            "y = Relu (h)",
            opset=opset,
            half=[0.5, 0.5, 0.5],
        )
        x, layer = torch.randn(20, 3, 4) + 1, nn.BatchNorm1d(3, eps=0.5, momentum=0.5)
        layer.running_mean += 0.5
        found = shift_of_model(model, (x,), 20)
        expected = bn.measure_shift(layer, x)
        assert found.score == pytest.approx(expected.score, rel=1e-4)
        assert found.noise == pytest.approx(expected.noise, rel=1e-4)

    @pytest.mark.parametrize("kind", ["float16", "double"])
    def test_other_types(self, kind):
        dtype = torch.float16 if kind == "float16" else torch.float64
        far = 1e9 if kind == "double" else 1  # which float32 does not tell from its neighbours
        x, layer = torch.randn(20, 3, 4).to(dtype) + far, trained(nn.BatchNorm1d(3).to(dtype))
        layer.running_mean += far
        model = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : 18]> g ({kind}[N, 3, 4] x) => ({kind}[N, 3, 4] y)'
            "{ y = BatchNormalization (x, s, b, m, v) }"
        )
        model.graph.initializer.extend(
            numpy_helper.from_array(values.detach().numpy(), name)
            for name, values in {
                "s": layer.weight, "b": layer.bias, "m": layer.running_mean, "v": layer.running_var
            }.items()
        )  # fmt: skip
        found, expected = shift_of_model(model, (x,), 20), bn.measure_shift(layer, x)
        assert found.score == pytest.approx(expected.score, rel=1e-4)
        assert found.score > 0

    def test_what_cannot_be(self):
        model = parsed(
            "m = Add (zeros, zeros) a = BatchNormalization (x, ones, zeros, m, ones)"
            "b = BatchNormalization (a, ones, zeros, zeros, ones)"
            "y = BatchNormalization (b, ones, zeros, zeros, odd)",
            odd=[1, np.nan, 1],
        )
        found = shift_of_model(model, (torch.randn(20, 3, 4),), 20)
        assert list(found.layers) == ["b"]
        assert found.left == {
            "a": "its statistics are computed in the graph",
            "y": "its running statistics are no mean and variance: see bn.check",
        }
        model = parsed("m = Add (zeros, ones) y = BatchNormalization (x, ones, zeros, m, ones)")
        with pytest.raises(FileError, match=r"none of its batch norms .*y: its statistics are"):
            shift_of_model(model, (torch.randn(20, 3, 4),), 20)


class TestAdapt:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("prior", [None, 0, 16])
    @pytest.mark.parametrize("size", [60, 25])
    def test_as_the_module_that_it_was(self, kind, prior, size):
        module, x = calibrated(), torch.randn(60, *SHAPE) + 1
        model = exported(kind, module)
        if kind == "onnx":
            for name in NAMES:
                module.get_submodule(name).num_batches_tracked.zero_()
        report = adapt_model(model, (x,), size, prior=prior)
        expected = bn.adapt(module, list(x.split(size)), prior=prior)
        assert report.done == expected.done == NAMES
        assert report.weights == pytest.approx(expected.weights, rel=1e-4)
        assert_same_shift(report.before, expected.before)
        assert report.after.score == pytest.approx(expected.after.score, rel=1e-2, abs=1e-5)
        for name, (mean, var) in statistics_of(model).items():
            layer = module.get_submodule(name)
            assert_close(mean, layer.running_mean, torch.float32, scale=10)
            assert_close(var, layer.running_var, torch.float32, scale=10)

    @pytest.mark.parametrize("kind", KINDS)
    def test_undone(self, kind):
        model = KINDS[kind]()
        before = {name: [v.clone() for v in pair] for name, pair in statistics_of(model).items()}
        report = adapt_model(model, (torch.randn(60, *SHAPE) + 1,), 60)
        assert not torch.equal(statistics_of(model)["bn"][0], before["bn"][0])
        report.undo()
        for name, pair in statistics_of(model).items():
            torch.testing.assert_close(list(pair), before[name], rtol=0, atol=0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_error_changes_nothing(self, kind, monkeypatch):
        model, calls = KINDS[kind](), []
        before = {name: [v.clone() for v in pair] for name, pair in statistics_of(model).items()}
        real = programs.Look.report

        def broken(look, *settings):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(look, *settings)

        monkeypatch.setattr(programs.Look, "report", broken)
        with pytest.raises(KeyboardInterrupt):
            adapt_model(model, (torch.randn(60, *SHAPE) + 1,), 60)
        for name, pair in statistics_of(model).items():
            torch.testing.assert_close(list(pair), before[name], rtol=0, atol=0)

    def test_names_stay_where_nodes_shared_their_tensors(self):
        tensors = {"a.running_mean": [0.0] * 3, "a.running_var": [1.0] * 3}
        model = parsed(
            'b = BatchNormalization (x, ones, zeros, "a.running_mean", "a.running_var")'
            'y = BatchNormalization (b, ones, zeros, "a.running_mean", "a.running_var")'.replace(
                '"', ""
            ).replace("a.running", "a_running"),
            a_running_mean=[0.0] * 3,
            a_running_var=[1.0] * 3,
        )
        for node in model.graph.node:
            node.input[3], node.input[4] = tensors
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace("a_running", "a.running")
        report = adapt_model(model, (torch.randn(60, 3, 4) + 1,), 60)
        assert report.done == list(report.before.layers) == list(report.after.layers)
        assert report.done == ["a", "a_2"]
        assert report.before.shifted
        assert not report.after.shifted

    @pytest.mark.parametrize("kind", KINDS)
    def test_statistics_that_do_not_fit(self, kind):
        if kind == "onnx":
            model = onnx.parser.parse_model(
                '<ir_version: 8, opset_import: ["" : 18]> g '
                "(float16[N, 3] x) => (float16[N, 3] y) { y = BatchNormalization (x, i, o, o, i) }"
            )
            model.graph.initializer.extend(
                numpy_helper.from_array(np.full(3, value, np.float16), name)
                for name, value in {"i": 1, "o": 0}.items()
            )
        else:
            model = torch.export.export(
                nn.Sequential(nn.Identity(), nn.BatchNorm1d(3).half()).eval(),
                (torch.randn(2, 3).half(),),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        report = adapt_model(model, ((torch.randn(60, 3) * 1000).half(),), 60, prior=0)
        assert list(report.left.values()) == ["its variance does not fit float16"]
        assert (report.done, report.weights) == ([], {})
        ((_, var),) = statistics_of(model).values()
        assert var.tolist() == [1, 1, 1]

    def test_the_prior_is_no_less_than_0(self):
        with pytest.raises(FileError, match="prior is -1: expected 0 or more"):
            adapt_model(program(), (torch.randn(60, *SHAPE),), 60, prior=-1)


@pytest.mark.parametrize("tool", [shift_of_model, adapt_model])
class TestWhatIsNoUse:
    def test_no_batch_norm(self, tool):
        x = torch.randn(4, *SHAPE)
        with pytest.raises(FileError, match="no batch norm, and a folded one remembers nothing"):
            tool(batch_may_vary(nn.ReLU()), (x,), 4)
        with pytest.raises(FileError, match=r"before it is folded, .*optimize=False"):
            tool(parsed("y = Relu (x)"), (torch.randn(4, 3, 4),), 4)

    def test_exported_in_training(self, tool):
        with pytest.raises(FileError, match=r"'bn' was exported in training, .*model.eval"):
            tool(batch_may_vary(net().train()), (torch.randn(4, *SHAPE),), 4)

    def test_fewer_examples_than_it_takes(self, tool):
        with pytest.raises(FileError, match="got 1 examples, expected 2 or more"):
            tool(program(dynamic=False), (torch.randn(1, *SHAPE),), 2)
