"""Exported models: calibrated as the modules that they were, and measured as these."""

import copy
import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from architectures import make_architecture
from models.exported import SHAPE, batch_may_vary, net, onnx_bytes, program_bytes, trained
from onnx import numpy_helper
from support import assert_close
from torch import nn

import batchnorm as bn
from batchnorm.models.files import FileError
from batchnorm.models.programs.calibrating import calibrate_model, same_statistics, statistics_of
from batchnorm.models.programs.inputs import inputs_of_program
from batchnorm.models.programs.running import inputs_of, outputs_of
from batchnorm.models.programs.training import training_module


def program(dynamic=True):
    return torch.export.load(io.BytesIO(program_bytes(dynamic)))


def graph():
    return onnx.load_model_from_string(onnx_bytes())


def decomposed(made):
    """Return a program of core operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch itself calls
        return made.run_decompositions()


KINDS = {"pt2": program, "onnx": graph}


def assert_statistics(model, module, names=None):
    """Assert that an exported model has the statistics of a module, as its type rounds them."""
    found = statistics_of(model)
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    }
    assert set(found) == set(names or layers)
    for name, (mean, var) in found.items():
        layer = layers[name]
        assert_close(mean, layer.running_mean, torch.float32, "sum", 4)
        assert_close(var, layer.running_var, torch.float32, "sum", 4)


class TestCalibrating:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [50, 16])
    def test_as_the_module_that_it_was(self, kind, size):
        model, module = KINDS[kind](), net()
        x = torch.randn(50, *SHAPE) * 3 + 1
        report = calibrate_model(model, (x,), size)
        bn.calibrate(module, x.split(size))
        assert_statistics(model, module)
        assert (report.done, report.left) == (["bn", "body.2", "last"], {})
        assert (report.batches, report.unused) == (-(-50 // size), 0)
        assert [moved.values for moved in report.moved.values()] == [50 * 64, 50 * 36, 50]
        y = outputs_of(model, (x,))
        y = y if isinstance(y, torch.Tensor) else y[0]
        assert_close(y, module(x), torch.float32, scale=10)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_first_layer_has_the_moments_of_all_data_however_they_are_split(self, kind):
        model = KINDS[kind]()
        x = torch.randn(50, *SHAPE) * 3 + 100
        calibrate_model(model, (x,), 7)
        h = nn.functional.conv2d(x.double(), net().conv.weight.double(), padding=1)
        mean, var = statistics_of(model)["bn"]
        assert_close(mean, h.mean((0, 2, 3)), torch.float32, "sum", 4)
        assert_close(var, h.var((0, 2, 3)), torch.float32, "sum", 4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_moved(self, kind):
        model = KINDS[kind]()
        before = {n: [np.array(v) for v in pair] for n, pair in statistics_of(model).items()}
        report = calibrate_model(model, (torch.randn(20, *SHAPE),), 20)
        for name, (mean, var) in statistics_of(model).items():
            mean, var, (mean_before, var_before) = np.array(mean), np.array(var), before[name]
            moved = report.moved[name]
            np.testing.assert_allclose(moved.mean, [mean_before.mean(), mean.mean()], rtol=1e-5)
            np.testing.assert_allclose(moved.var, [var_before.mean(), var.mean()], rtol=1e-5)
            changes = abs(mean - mean_before) / var_before**0.5, abs(var / var_before - 1)
            np.testing.assert_allclose(moved.change, np.max(changes), rtol=1e-4)
        assert report.to_dict()["moved"]["bn"]["values"] == 20 * 64

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_more_batches_than_asked_for(self, kind):
        x = torch.randn(50, *SHAPE)
        some, first = KINDS[kind](), KINDS[kind]()
        assert calibrate_model(some, (x,), 8, max_batches=2).batches == 2
        calibrate_model(first, (x[:16],), 8)
        assert same_statistics(some, first)

    def test_a_fixed_number_of_examples(self):
        model = program(dynamic=False)
        assert inputs_of(model).batch_size == 2
        report = calibrate_model(model, (torch.randn(9, *SHAPE),), 2)
        assert (report.batches, report.unused) == (4, 1)
        with pytest.raises(FileError, match="got 1 examples, expected 2 or more"):
            calibrate_model(model, (torch.randn(1, *SHAPE),), 2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_value_a_channel_is_normalized_by_what_was(self, kind):
        model, module = KINDS[kind](), net()
        x = torch.randn(5, *SHAPE)
        calibrate_model(model, (x,), 1)
        bn.calibrate(module, x.split(1))
        assert_statistics(model, module)

    @pytest.mark.parametrize("kind", KINDS)
    def test_batches_that_are_not_finite_do_not_count(self, kind):
        model, clean = KINDS[kind](), KINDS[kind]()
        x = torch.randn(12, *SHAPE)
        calibrate_model(clean, (x[:8],), 4)
        x[8:] = torch.inf
        calibrate_model(model, (x,), 4)
        assert same_statistics(model, clean)
        report = calibrate_model(model, (x[8:],), 4)
        assert set(report.left.values()) == {"no batch was finite"}
        assert same_statistics(model, clean)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_value_alone_has_no_variance(self, kind):
        model = KINDS[kind]()
        report = calibrate_model(model, (torch.randn(1, *SHAPE),), 1)
        assert report.left == {"last": "it saw one value a channel, which has no variance"}


class Several(nn.Module):
    """A layer that is used twice, one under no_grad, one with statistics of its own type."""

    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm2d(3, affine=False)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.small = nn.BatchNorm2d(3).half()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        with torch.no_grad():
            x = self.shared(x * 2)
        x = self.plain(self.shared(x) + 1)
        x = nn.functional.batch_norm(x, self.mean + 1, self.mean + 1)
        return self.small(x.half() * 100).float()


class TestCalibratingPrograms:
    @pytest.mark.parametrize("core", [False, True])
    def test_layers_of_all_sorts(self, core):
        torch.manual_seed(0)
        module = trained(Several())
        made = torch.export.export(
            copy.deepcopy(module),
            (torch.randn(2, 3, 4, 4),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        if core:
            made = decomposed(made)
        x = torch.randn(10, 3, 4, 4)
        report = calibrate_model(made, (x,), 5)
        bn.calibrate(module, x.split(5))
        assert report.done == ["shared", "small"]
        reasons = {
            "it has no running statistics",
            "its statistics are computed in the program, or in a branch",
        }
        assert set(report.left.values()) == (reasons if not core else reasons - {
            "it has no running statistics"})  # fmt: skip
        assert report.moved["shared"].values == 2 * 160
        found = statistics_of(made)
        for name in ("shared", "small"):
            layer = module.get_submodule(name)
            for ours, theirs in zip(
                found[name], (layer.running_mean, layer.running_var), strict=True
            ):
                assert ours.dtype == theirs.dtype
                assert_close(ours, theirs, theirs.dtype, "sum")
            assert made.state_dict[f"{name}.num_batches_tracked"] == layer.num_batches_tracked
        file = io.BytesIO()
        torch.export.save(made, file)  # as the program that it was, with other statistics
        file.seek(0)
        assert_close(torch.export.load(file).module()(x), module(x), x.dtype, "sum")

    def test_exported_in_training(self):
        made = batch_may_vary(net().train())
        with pytest.raises(FileError, match=r"'bn' was exported in training, .*model.eval"):
            calibrate_model(made, (torch.randn(4, *SHAPE),), 4)

    def test_none_at_all(self):
        with pytest.raises(FileError, match="it has no batch norm"):
            calibrate_model(batch_may_vary(nn.ReLU()), (torch.randn(4, *SHAPE),), 4)

    @pytest.mark.parametrize("name", ["resnet", "mobilenet_v1", "wav2vec2_conformer"])
    def test_published_architectures(self, name):
        module, (x,) = make_architecture(name)
        made = torch.export.export(module, (x,))
        twin = copy.deepcopy(module)
        data = torch.cat([x, torch.randn_like(x) * 2])
        report = calibrate_model(made, (data,), 2)
        bn.calibrate(twin, data.split(2))
        assert not report.left
        assert_statistics(made, twin)


def parsed(text, opset=18, **tensors):
    """Return an ONNX model of a text, with initializers."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> '
        f"g (float[N, 3, 4] x) => (float[N, 3, 4] y) {{ {text} }}"
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(values, np.float32), name)
        for name, values in {"ones": [1, 1, 1], "zeros": [0, 0, 0], **tensors}.items()
    )
    onnx.checker.check_model(model)
    return model


class TestCalibratingOnnx:
    @pytest.mark.parametrize("opset", [9, 13, 15, 17, 18, 21])
    def test_every_version(self, opset):
        model = parsed(
            "h = BatchNormalization (x, ones, zeros, zeros, ones) y = Relu (h)", opset=opset
        )
        x = torch.randn(10, 3, 4) * 2 + 1
        assert calibrate_model(model, (x,), 4).batches == 3
        ((mean, var),) = statistics_of(model).values()
        assert_close(mean, x.double().mean((0, 2)), torch.float32)
        assert_close(var, x.double().var((0, 2)), torch.float32)
        assert model.opset_import[0].version == opset
        onnx.checker.check_model(model)

    def test_equal_tensors_that_are_kept_once(self):
        """Of layers as they are made: each gets its own, and what is no statistic stays."""
        model = parsed(
            "a = BatchNormalization (x, ones, zeros, zeros, ones)"
            "b = BatchNormalization (a, ones, zeros, zeros, ones)"
            "c = Add (b, x) y = BatchNormalization (c, ones, zeros, zeros, ones)"
        )
        x = torch.randn(10, 3, 4) * 2 + 1
        calibrate_model(model, (x,), 10)
        module = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(3))

        def call(m, x):
            return m[2](m[1](m[0](x)) + x)

        bn.calibrate(module, x, call=call)
        for (mean, var), layer in zip(statistics_of(model).values(), module, strict=True):
            assert_close(mean, layer.running_mean, torch.float32, scale=100)  # some are near 0
            assert_close(var, layer.running_var, torch.float32, scale=4)
        kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert kept["ones"].tolist() == [1, 1, 1]
        assert kept["zeros"].tolist() == [0, 0, 0]
        y = outputs_of(model, (x,))[0]
        assert_close(y, call(module.eval(), x), torch.float32, scale=4)

    def test_what_cannot_be(self):
        model = parsed(
            "m = Add (zeros, zeros) a = BatchNormalization (x, ones, zeros, m, ones)"
            "b = BatchNormalization (a, ones, zeros, zeros, ones)"
            "c = ReduceSum <keepdims = 0> (x) d = Cast <to = 9> (c)"
            "y = If (d) <then_branch = t () => (float[N, 3, 4] e)"
            "{ [inner] e = BatchNormalization (b, ones, zeros, zeros, ones) },"
            "else_branch = f () => (float[N, 3, 4] e) { e = Identity (b) }>"
        )
        report = calibrate_model(model, (torch.randn(4, 3, 4),), 4)
        assert report.left == {
            "inner": "it is in a branch or a function",
            "a": "its statistics are computed in the graph",
        }
        assert report.done == ["b"]

    def test_a_variance_that_does_not_fit(self):
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 18]>'
            "g (float16[N, 3, 4] x) => (float16[N, 3, 4] y)"
            "<float16[3] s = {1, 1, 1}, float16[3] m = {0, 0, 0}, float16[3] v = {1, 1, 1}>"
            "{ y = BatchNormalization (x, s, m, m, v) }"
        )
        x = torch.randn(10, 3, 4).half()
        assert calibrate_model(model, (x,), 10).done == ["y"]
        ((_, var),) = statistics_of(model).values()
        assert numpy_helper.to_array(model.graph.initializer[-1]).dtype == np.float16
        assert_close(var, x.double().var((0, 2)), torch.float16, scale=2)
        report = calibrate_model(model, (x * 1000,), 10)
        assert report.left == {"y": "its variance does not fit float16"}

    def test_exported_in_training(self):
        model = parsed(
            "y, m, v = BatchNormalization <training_mode = 1> (x, ones, zeros, zeros, ones)"
        )
        with pytest.raises(FileError, match=r"'y' was exported in training, .*model.eval"):
            calibrate_model(model, (torch.randn(4, 3, 4),), 4)

    def test_none_at_all(self):
        with pytest.raises(FileError, match=r"it has no batch norm.*optimize=False"):
            calibrate_model(parsed("y = Relu (x)"), (torch.randn(4, 3, 4),), 4)


class TestInputs:
    def test_of_a_program(self):
        class Both(nn.Module):
            def forward(self, x, flag=True, *, mask=None, scale=2.0):
                return (x * mask if flag else x) * scale

        made = torch.export.export(
            Both(),
            (torch.randn(4, 3), False),
            {"mask": torch.ones(4, 3), "scale": 3.0},
        )
        inputs = inputs_of_program(made)
        assert [(i.name, i.shape) for i in inputs.tensors] == [("x", (4, 3)), ("mask", (4, 3))]
        values = torch.randn(4, 3), torch.randn(4, 3)
        args, keywords = inputs.arguments(values)
        torch.testing.assert_close(made.module()(*args, **keywords), values[0] * 3)

    def test_drawn_values(self):
        inputs = inputs_of(program())
        assert [tuple(v.shape) for v in inputs.drawn()] == [(2, *SHAPE)]
        assert [tuple(v.shape) for v in inputs.drawn(5)] == [(5, *SHAPE)]
        assert torch.equal(inputs.drawn(5)[0], inputs.drawn(5)[0])
        with pytest.raises(FileError, match="--batch-size 5: the model takes exactly 2 examples"):
            inputs_of(program(dynamic=False)).drawn(5)
        assert [tuple(v.shape) for v in inputs_of(graph()).drawn()] == [(2, *SHAPE)]

    def test_a_size_that_is_not_known(self):
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 18]> g (float[N, 3, L] x) => (float[N, 3, L] y)'
            "{ y = Relu (x) }"
        )
        with pytest.raises(FileError, match=r"'x' is of shape \(N, 3, \?\), .*give --data"):
            inputs_of(model).drawn()

    @pytest.mark.parametrize(
        ("arrays", "said"),
        [
            ({"x": np.ones((9, 8, 8), "f4")}, r"got shape (9, 8, 8), expected (N, 1, 8, 8)"),
            ({"x": np.ones((9, 1, 8, 9), "f4")}, "got shape (9, 1, 8, 9), expected (N, 1, 8, 8)"),
            ({"x": np.ones((0, 1, 8, 8), "f4")}, "got no examples"),
            ({"x": np.ones((9, 1, 8, 8), "u1")}, "got values of type uint8, expected float32"),
            ({"x": np.full((9, 1, 8, 8), np.nan)}, "NaN, infinite or too large"),
            ({"x": np.full((9, 1, 8, 8), 1e300)}, "NaN, infinite or too large"),
            ({"a": np.ones(1), "b": np.ones(1)}, "got a, b, expected an array for each input"),
        ],
    )
    def test_data_that_do_not_fit(self, arrays, said):
        with pytest.raises(FileError) as refused:
            inputs_of(program()).matched("here.npz", arrays)
        assert str(refused.value).startswith("here.npz: ")
        assert said in str(refused.value)

    def test_data_that_do(self):
        (x,) = inputs_of(program()).matched("here", {"any": np.ones((9, *SHAPE), ">f8")})
        assert x.dtype == torch.float32
        assert x.shape == (9, *SHAPE)


class TestTraining:
    """What `batchnorm memory` measures is what training the module would keep."""

    def test_as_the_module_that_it_was(self):
        module = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Dropout(0.2, inplace=True)),
            *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)),
            *(nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ELU(0.5)),
        ).eval()
        example = (torch.randn(2, *SHAPE),)
        made = torch.export.export(module, example)
        expected = bn.memory_report(module.train(), example).total
        assert expected["save_memory"] < 0.8 * expected["stock"]
        assert bn.memory_report(training_module(made), example).total == expected
        made = decomposed(torch.export.export(module.eval(), example))
        found = bn.memory_report(training_module(made), example).total
        assert found["stock"] <= expected["stock"]  # without its dropout

    def test_dropout_drops(self):
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5)).eval()
        made = torch.export.export(model, (torch.randn(4, *SHAPE),))
        y = training_module(made)(torch.randn(4, *SHAPE))
        assert (y == 0).any()
