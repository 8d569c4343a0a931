import copy
import importlib.util
import json
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.models import parity

onnx = pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="needs onnxscript")
inductor = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


def network(library=bn):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), library.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model(torch.randn(8, 3, 6, 6) + 1)
    return model


class Odd(nn.Module):
    """Computes something else where a compiler looks on."""

    def forward(self, x, by=0.5):
        return {"y": F.relu(x) + (by if torch.compiler.is_compiling() else 0), "n": x.shape[0]}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@onnx
@inductor
def test_all_ways_agree():
    model, x = network(), torch.randn(2, 3, 6, 6)
    report = bn.check_parity(model, (x,))
    assert report.ok
    assert [way.way for way in report.ways] == ["compiled", "exported", "onnx"]
    for way in report.ways:
        assert (way.nodes, way.verdict, way.reason) == (1, "agrees", "")
        assert way.error < 1e-6
    assert report.to_dict()["ways"][0]["way"] == "compiled"
    assert json.loads(json.dumps(report.to_dict()))["ok"]
    lines = repr(report).splitlines()
    assert lines[0] == "3 of 3 ways agree with eager evaluation"
    assert len(lines) == 5
    assert max(map(len, lines)) <= 80


def test_without_a_compiler_the_graph_alone_is_compiled(monkeypatch):
    monkeypatch.setattr(parity.shutil, "which", lambda _: None)
    report = bn.check_parity(network(), torch.randn(2, 3, 6, 6), ways="compiled")
    assert report.ok
    assert report.ways[0].nodes == 1


def test_a_difference_is_found_and_measured(monkeypatch):
    monkeypatch.setattr(parity.shutil, "which", lambda _: None)
    report = bn.check_parity(Odd(), torch.tensor([-1.0, 2.0]), ways=["compiled", "exported"])
    assert not report.ok
    for way in report.ways:
        assert (way.verdict, way.error, way.nodes) == ("differs", 0.25, 0)
    x = torch.tensor([-1.0, 2.0])
    report = bn.check_parity(Odd(), (x,), keywords={"by": 1e-3}, ways=["exported"])
    assert report.ways[0].error == pytest.approx(5e-4, rel=1e-3)
    assert bn.check_parity(Odd(), (x,), keywords={"by": 1e-3}, ways=["exported"], tol=1e-3).ok


@onnx
def test_what_fails_is_reported_with_its_first_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    report = bn.check_parity(Branches(), torch.ones(3), ways=["exported", "onnx"])
    for way in report.ways:
        assert (way.verdict, way.error, way.nodes) == ("failed", None, None)
        assert "GuardOnDataDependentSymNode: Could not guard on data-dependent" in way.reason
        assert "\n" not in way.reason
    assert not report.ok
    assert max(map(len, repr(report).splitlines())) <= 80
    assert "Could not guard" in repr(report)


def test_what_a_compiler_raises_is_named(monkeypatch):
    def broken(*_):
        raise ArithmeticError("no such thing\nand more")

    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda _: broken)
    (way,) = bn.check_parity(network(), torch.randn(2, 3, 6, 6), ways="compiled").ways
    assert (way.verdict, way.reason) == ("failed", "ArithmeticError: no such thing")


def test_what_is_not_installed_is_not_tried(monkeypatch):
    monkeypatch.setattr(parity, "find_spec", lambda name: None if name == "onnxruntime" else name)
    model, x = network(), torch.randn(2, 3, 6, 6)
    report = bn.check_parity(model, (x,), ways=("exported", "onnx"))
    assert report.ok
    assert report.ways[1].verdict == "not tried"
    assert "onnxruntime missing: pip install onnx onnxscript onnxruntime" in repr(report)
    assert not bn.check_parity(model, (x,), ways=("onnx",)).ok


class Counts(nn.Module):
    """A model that counts its calls, and changes its input."""

    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm1d(3, update="always")
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        assert not self.training
        return self.norm(x.add_(1)), self.calls


def test_the_model_and_the_example_stay_what_they_are():
    model, x = Counts().train(), torch.randn(5, 3)
    model.norm.eval()
    before, given = copy.deepcopy(model.state_dict()), x.clone()
    report = bn.check_parity(model, x, ways=("exported",))
    assert report.ok
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(x, given)
    assert (model.training, model.norm.training) == (True, False)


def test_the_model_stays_what_it_is_where_it_raises():
    model = network().train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="expected input"):
        bn.check_parity(model, torch.randn(2, 5, 6, 6))
    assert (model.training, model[0].training) == (True, False)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("ways", [("exported", "script"), (), "eager"])
def test_ways_that_there_are_not(ways):
    with pytest.raises(ValueError, match="expected some of 'compiled', 'exported', 'onnx'"):
        bn.check_parity(network(), torch.randn(2, 3, 6, 6), ways=ways)


def test_a_model_without_an_output_to_compare():
    with pytest.raises(ValueError, match="no floating-point number"):
        bn.check_parity(nn.Flatten(0), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_tolerance_is_that_of_the_coarsest_type(dtype):
    model = network(nn).to(dtype)
    (way,) = bn.check_parity(model, torch.randn(2, 3, 6, 6, dtype=dtype), ways="exported").ways
    assert way.tolerance == {torch.float64: 1e-10, torch.bfloat16: 5e-2}[dtype]
    assert way.verdict == "agrees"


@onnx
def test_torch_warns_of_nothing_that_is_its_own(caplog, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bn.check_parity(network(), torch.randn(2, 3, 6, 6), ways=("onnx",))
    assert report.ok
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    assert capsys.readouterr().out == ""


@onnx
def test_onnx_takes_keywords_in_any_order_and_returns_what_has_no_structure():
    class Model(nn.Module):
        def forward(self, x, scale, shift=None):
            return {"y": x * scale, "rest": [x + shift, None]}

    keywords = {"shift": torch.tensor(2.0), "scale": torch.tensor(3.0)}
    assert bn.check_parity(Model(), torch.randn(4), keywords=keywords, ways="onnx").ok
