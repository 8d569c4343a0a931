"""The doctor for exported models: what it finds in files, as in the modules that they were."""

import copy
import functools
import io

import numpy as np
import onnx
import pytest
import torch
from models.exported import SHAPE, Net, batch_may_vary, onnx_of
from models.test_programs import decomposed
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.diagnose.check_files import CALIBRATE
from batchnorm.diagnose.check_programs import check_model
from batchnorm.models.files import FileError
from batchnorm.models.programs.calibrating import calibrate_model
from batchnorm.study.data import load

KINDS = ("pt2", "onnx")
NAMES = ["bn", "body.2", "last"]
SIZE = 64


@functools.cache
def digits():
    """Return some training inputs, and their labels."""
    found = load("digits")
    return torch.from_numpy(found.train_inputs[:720]), torch.from_numpy(found.train_labels[:720])


@functools.cache
def _trained():
    torch.manual_seed(0)
    (x, y), model, epochs = digits(), Net(), 6
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, epochs * (len(x) // 48))
    for order in (torch.randperm(len(x)) for _ in range(epochs)):
        for chosen in order.split(48)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def healthy():
    """Return a copy of a small network, trained for a while on the digits."""
    return copy.deepcopy(_trained())


@functools.cache
def _content(kind):
    if kind == "onnx":
        return onnx_of(healthy()).SerializeToString()
    file = io.BytesIO()
    torch.export.save(batch_may_vary(healthy()), file)
    return file.getvalue()


def exported(kind, module):
    """Return what an exporter makes of the network, with parameters and statistics of a module."""
    if kind == "pt2":
        model = torch.export.load(io.BytesIO(_content(kind)))
        for name, value in module.state_dict().items():
            model.state_dict[name].data.copy_(value)
        return model
    model = onnx.load_model_from_string(_content(kind))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in module.state_dict().items():
        if name in tensors:
            tensors[name].CopyFrom(numpy_helper.from_array(value.numpy(), name))
    return model


def norm_model(shape, count=1):
    """Return an ONNX model of some batch norms that know of data of mean 0 and variance 1."""
    channels, tensors, nodes = shape[1], [], []
    for at in range(count):
        names = [f"{at}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        values = [
            np.linspace(*ends, channels) for ends in ((0.5, 2), (-1, 1), (0, 0.02), (1, 1.02))
        ]
        tensors += [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in zip(names, values, strict=True)
        ]
        inputs, outputs = [f"x{at}" if at else "x", *names], [f"x{at + 1}"]
        nodes.append(helper.make_node("BatchNormalization", inputs, outputs))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape[1:]])
        for name in ("x", f"x{count}")
    ]
    graph = helper.make_graph(nodes, "norms", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def dynamic(module, example):
    """Return the program of a module that takes any number of examples."""
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(module.eval(), (example,), dynamic_shapes=(batch,))


def told(report):
    return [(finding.severity, finding.code, finding.layer) for finding in report.findings]


def never_updated(module):
    module.body[2].reset_running_stats()


def nan_statistics(module):
    module.bn.running_var[2] = torch.nan


def negative(module):
    module.last.running_var[3] = -1


def huge(module):
    module.last.running_var[3] = 1e9


@torch.no_grad()
def nan_weights(module):
    module.body[2].weight[0] = torch.nan


@torch.no_grad()
def dead_channel(module):
    module.conv.weight[1] = 0
    bn.calibrate(module, digits()[0].split(48), sequential=True)


def moved_weights(module):
    module.body[1].weight.data *= 4


#: What is planted, and what is found of it.
PLANTS = {
    never_updated: [("error", "eval_train_gap", "body.2"), ("error", "never_updated", "body.2")],
    nan_statistics: [("error", "eval_train_gap", "bn"), ("error", "non_finite_statistics", "bn")],
    negative: [("error", "negative_variance", "last"), ("warning", "eval_train_gap", "last")],
    huge: [("warning", "exploding_variance", "last")],
    nan_weights: [("error", "non_finite_affine", "body.2")],
    dead_channel: [("note", "constant_channels", "bn")],
    moved_weights: [("error", "eval_train_gap", "body.2")],
}


@pytest.mark.parametrize("kind", KINDS)
class TestAsTheModuleThatItWas:
    def report(self, kind, module, x=None, **options):
        return check_model(
            exported(kind, module), (digits()[0] if x is None else x,), SIZE,
            labels=digits()[1], **options,
        )  # fmt: skip

    def test_a_healthy_one(self, kind):
        report = self.report(kind, healthy())
        assert report.findings == []
        assert list(report.gaps) == NAMES
        assert (report.layers, report.batches) == (3, 12)
        assert report.accuracy["evaluation"] > 0.5

    @pytest.mark.parametrize("plant", PLANTS)
    def test_a_fault(self, kind, plant):
        module = healthy()
        plant(module)
        report = self.report(kind, module)
        assert told(report) == PLANTS[plant]
        order = torch.randperm(len(digits()[0]), generator=torch.Generator().manual_seed(0))
        batches = list(zip(*(values[order].split(SIZE) for values in digits()), strict=True))
        expected = bn.check(module, batches)
        expected.findings = [f for f in expected.findings if f.code != "bias_before_norm"]
        assert told(report) == told(expected)
        assert [f.cause for f in report.findings] == [f.cause for f in expected.findings]
        assert report.gaps == pytest.approx(expected.gaps, rel=1e-3, abs=1e-4)
        assert (report.outputs is None) == (expected.outputs is None)
        assert (report.outputs or 0) == pytest.approx(expected.outputs or 0, rel=1e-3)
        assert report.accuracy == pytest.approx(expected.accuracy, abs=2e-3)

    @pytest.mark.parametrize("plant", [never_updated, nan_statistics, negative, moved_weights])
    def test_calibrating_is_the_remedy_that_is_named(self, kind, plant):
        module = healthy()
        plant(module)
        model, (x, y) = exported(kind, module), digits()
        fixes = {finding.fix for finding in check_model(model, (x,), SIZE, labels=y).findings}
        assert fixes == {CALIBRATE}
        calibrate_model(model, (x,), 48)
        assert check_model(model, (x,), SIZE, labels=y).findings == []

    def test_another_preparation(self, kind):
        report = check_model(exported(kind, healthy()), (digits()[0] * 255,), SIZE)
        assert told(report) == [("error", "eval_train_gap", "bn")]
        assert "another preparation of the data" in report.findings[0].cause
        assert report.gaps["bn"] > 100

    def test_no_more_batches_than_asked_for(self, kind):
        report = self.report(kind, healthy(), max_batches=3)
        assert report.batches == 3

    def test_examples_one_by_one(self, kind):
        report = check_model(exported(kind, healthy()), (digits()[0][:40],), 1)
        assert report.batches == 40
        assert report.ok

    def test_the_model_stays_as_it_is(self, kind):
        model = exported(kind, healthy())
        before = (
            {name: value.clone() for name, value in model.state_dict.items()}
            if kind == "pt2" else model.SerializeToString(deterministic=True)
        )  # fmt: skip
        check_model(model, (digits()[0],), SIZE)
        if kind == "pt2":
            assert all(torch.equal(value, before[n]) for n, value in model.state_dict.items())
        else:
            assert model.SerializeToString(deterministic=True) == before

    def test_examples_that_are_sorted(self, kind):
        x, y = digits()
        order = y.argsort()
        report = check_model(exported(kind, healthy()), (x[order],), SIZE)
        assert told(report) == [("note", "unshuffled_batches", "")]
        labelled = check_model(exported(kind, healthy()), (x[order],), SIZE, labels=y[order])
        assert "; the labels, " in labelled.findings[0].evidence
        assert labelled.accuracy["batch"] > 0.5  # for they are shuffled first


class TestWhatAnExporterWrites:
    @pytest.mark.parametrize("momentum", [0.0, 0.01, 1.0, 1.5])
    def test_a_momentum_is_no_fault(self, momentum):
        model = exported("onnx", healthy())
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "momentum":
                    attribute.f = momentum
        assert check_model(model, (digits()[0],), SIZE).findings == []

    @pytest.mark.parametrize("momentum", [None, 0.0, 0.99, 1.0])
    def test_nor_in_a_program(self, momentum):
        module = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum))
        module[0].num_batches_tracked += 1
        report = check_model(dynamic(module, torch.randn(2, 3)), (torch.randn(500, 3),), 50)
        assert report.findings == []

    def test_operators_of_the_core(self):
        module = healthy()
        never_updated(module)
        x, y = digits()
        report = check_model(decomposed(exported("pt2", module)), (x,), SIZE, labels=y)
        assert told(report) == PLANTS[never_updated]

    def test_too_few_steps(self):
        module = nn.Sequential(nn.BatchNorm1d(3)).train()
        for _ in range(5):
            module(torch.randn(200, 3) / 100)
        model = dynamic(module, torch.randn(2, 3))
        report = check_model(model, (torch.randn(500, 3) / 100,), 50)
        assert ("warning", "not_converged", "0") in told(report)
        assert "not_converged of '0', see there" in report.findings[0].cause


class TestWhatIsMixedUp:
    @pytest.mark.parametrize("kind", KINDS)
    def test_eps(self, kind):
        model = exported(kind, healthy())
        if kind == "onnx":
            node = next(n for n in model.graph.node if n.op_type == "BatchNormalization")
            next(a for a in node.attribute if a.name == "epsilon").f = 1e-3
        else:
            module = healthy()
            module.bn.eps = 1e-3
            model = batch_may_vary(module)
        [finding] = check_model(model, (digits()[0],), SIZE).findings
        assert (finding.code, finding.layer) == ("eps_mismatch", "bn")
        assert finding.fix == (
            "model.get_submodule('bn').eps = 1e-05  # in Python; then export it again"
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_half_types(self, kind):
        x = torch.randn(500, 3)
        if kind == "onnx":
            model = norm_model(x.shape)
            for tensor in model.graph.initializer:
                if "running" in tensor.name:
                    half = numpy_helper.to_array(tensor).astype(np.float16)
                    tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
        else:
            model, x = dynamic(nn.Sequential(nn.BatchNorm1d(3)).half(), x[:2].half()), x.half()
        [finding] = check_model(model, (x,), 50).findings
        assert (finding.code, finding.layer) == ("half_statistics", "0")
        assert "float16" in finding.evidence

    @pytest.mark.parametrize("kind", KINDS)
    def test_padding(self, kind):
        x = torch.randn(200, 4, 30)
        for row, length in enumerate(torch.randint(10, 30, (200,)).tolist()):
            x[row, :, length:] = 0
        model = (
            norm_model(x.shape) if kind == "onnx"
            else dynamic(nn.Sequential(nn.BatchNorm1d(4)), x[:2])
        )  # fmt: skip
        found = {f.code: f for f in check_model(model, (x,), 20).findings}
        assert found["padding_in_statistics"].layer == "0"
        assert "in Python; then export it again" in found["padding_in_statistics"].fix

    def test_dropout(self):
        module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
        x = torch.randn(2000, 5)
        for _ in range(100):
            module(x[torch.randint(len(x), (50,))])
        report = check_model(dynamic(module, x[:2]), (x,), 50)
        assert [(f.code, f.fix) for f in report.findings] == [("dropout_before_norm", CALIBRATE)]

    def test_what_overflows(self):
        model = norm_model((2, 3), count=2)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        large = np.full(3, 3e38, np.float32)
        tensors["0.weight"].CopyFrom(numpy_helper.from_array(large, "0.weight"))
        report = check_model(model, (torch.randn(500, 3) * 2,), 50)
        [finding] = [finding for finding in report.findings if finding.code == "non_finite_input"]
        assert finding.layer == "1"


class TestWhatIsLeft:
    def test_no_running_statistics(self):
        module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
        report = check_model(dynamic(module, torch.randn(2, 3)), (torch.randn(500, 3),), 50)
        assert told(report) == [("warning", "batch_dependent_evaluation", "1")]
        assert report.layers == 2

    def test_statistics_that_the_graph_computes(self):
        model = norm_model((2, 3), count=2)
        computed = helper.make_node("Abs", ["1.running_mean"], ["computed"])
        model.graph.node.insert(0, computed)
        model.graph.node[2].input[3] = "computed"
        report = check_model(model, (torch.randn(500, 3),), 50)
        [finding] = report.findings
        assert (finding.severity, finding.code) == ("note", "not_checked")
        assert finding.evidence == "its statistics are computed in the graph"

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_batch_norm(self, kind):
        model = norm_model((2, 3))
        if kind == "onnx":
            model.graph.node[0].CopyFrom(helper.make_node("Relu", ["x"], ["x1"]))
        else:
            model = dynamic(nn.ReLU(), torch.randn(2, 3))
        with pytest.raises(FileError, match="it has no batch norm, and a folded one remembers"):
            check_model(model, (torch.randn(20, 3),), 10)

    def test_exported_in_training(self):
        model = torch.export.export(Net().train(), (torch.randn(2, *SHAPE),))
        with pytest.raises(FileError, match="was exported in training"):
            check_model(model, (torch.randn(4, *SHAPE),), 2)

    def test_none_that_can_be_read(self):
        model = norm_model((2, 3))
        model.graph.node.insert(0, helper.make_node("Abs", ["0.running_mean"], ["computed"]))
        model.graph.node[1].input[3] = "computed"
        report = check_model(model, (torch.randn(500, 3),), 50)
        assert [finding.code for finding in report.findings] == ["not_checked"]
        assert report.layers == 0


def test_what_a_layer_gets_may_be_an_output_too():
    model = norm_model((2, 3), count=2)
    model.graph.output.append(helper.make_tensor_value_info("x1", TensorProto.FLOAT, ["n", 3]))
    report = check_model(model, (torch.randn(500, 3) + 9,), 50)
    assert list(report.gaps) == ["0", "1"]
    assert told(report)[0] == ("error", "eval_train_gap", "0")
