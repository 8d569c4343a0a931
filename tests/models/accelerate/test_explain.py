"""What is said of what runs fused, and that asking changes nothing."""

import pytest
import torch
from models.accelerate.networks import Network, images
from models.holding import attributes, buffers_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn


def several(m, x, r):
    y = F.relu(m.norms[0](x) + r)
    y = F.relu(m.norms[0](y))
    y = F.dropout(m.norms[1](y), 0.1, m.training)
    return F.batch_norm(y, None, None, training=True)


def test_each_call_is_named():
    report = bn.explain(Network(several), images())
    assert report.fused == {"norms.0": "add + relu", "norms.0 (call 2)": "relu"}
    assert report.done == ["norms.0", "norms.0 (call 2)"]
    assert report.left.keys() == {"norms.1", "", "norms.2"}
    assert report.left["norms.1"] == "dropout follows"
    assert report.left[""] == "it is returned"
    assert report.left["norms.2"].startswith("the example does not reach it")
    assert report.graphs == 1


def test_the_report_is_for_a_terminal_and_for_a_program():
    report = bn.explain(Network(several), images())
    lines = repr(report).splitlines()
    assert lines[:5] == [
        "2 fused: norms.0, norms.0 (call 2)",
        "  with add + relu: 1",
        "  with relu: 1",
        "  left norms.1: dropout follows",
        "  left itself: it is returned",
    ]
    assert max(map(len, lines)) <= 80
    assert report.to_dict() == {
        "verb": "fused",
        "done": report.done,
        "left": report.left,
        "fused": report.fused,
        "graphs": 1,
    }


def test_the_mode_counts():
    model = Network(several)
    assert bn.explain(model.eval(), images()).left["norms.1"] == "batch_norm follows"


def test_asking_changes_nothing():
    model, inputs = Network(several), images()
    before, held, random = attributes(model), buffers_of(model), torch.get_rng_state()
    bn.explain(model, inputs)
    assert [kind for kind, _ in attributes(model)] == [kind for kind, _ in before]
    torch.testing.assert_close(buffers_of(model), held, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_an_error_changes_nothing():
    def function(m, x, r):
        y = F.relu(m.norms[0](x) + r)
        torch._dynamo.graph_break()
        return y.view(-1, 7)

    model = Network(function)
    held, random = buffers_of(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="view"):
        bn.explain(model, [torch.ones(3, 4, 5, 5)] * 2)
    torch.testing.assert_close(buffers_of(model), held, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


class Named(nn.Module):
    """A model that takes a keyword."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x, *, residual):
        return F.relu(self.norm(x) + residual)


def _compiled_in_place():
    model = Named()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "made",
    [
        Named,
        lambda: bn.accelerate(Named()),
        lambda: bn.accelerate(bn.accelerate(Named()), save_memory=True),
        lambda: torch.compile(Named(), backend="eager"),
        _compiled_in_place,
    ],
    ids=["", "accelerated", "twice", "compiled", "compiled in place"],
)
def test_a_model_that_is_compiled_or_not(made):
    x, residual = images()
    report = bn.explain(made(), x, keywords={"residual": residual})
    assert report.fused == {"norm": "add + relu"}


def test_layers_under_a_checkpoint():
    def function(m, x, r):
        def part(x):
            return F.relu(m.norms[0](x) + r)

        return m.norms[1](checkpoint(part, x, use_reentrant=False))

    report = bn.explain(Network(function), images())
    assert report.fused == {"norms.0": "add + relu"}
    assert report.left["norms.1"] == "it is returned"


def test_some_layers():
    report = bn.explain(Network(several), images(), where="norms.[12]")
    assert (report.fused, list(report.left)) == ({}, ["norms.1", "norms.2"])
    with pytest.raises(ValueError, match="the name of no batch norm"):
        bn.explain(Network(several), images(), where="norms.7")


def test_layers_of_ours_and_of_others():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("running_mean", "running_var"):
                self.register_buffer(name, torch.ones(4))

        def forward(self, x):
            return x * self.running_var.view(4, 1, 1) + self.running_mean.view(4, 1, 1)

    model = nn.Sequential(
        bn.BatchNorm2d(4), nn.ReLU(), Frozen(), bn.BatchNorm2d(4, activation="relu")
    )
    report = bn.explain(model, images(n=1))
    assert report.fused == {"0": "relu"}
    assert report.left["2"].startswith("it is a Frozen, which does not call batch_norm")
    assert report.left.keys() == {"2", "3"}
    report = bn.explain(model.eval(), images(n=1))  # where ours are torch's and what follows
    assert report.fused.keys() <= {"0", "3"}
    assert report.fused["0"] == "relu"


def test_graphs_are_counted():
    def function(m, x, r):
        y = m.norms[0](x)
        torch._dynamo.graph_break()
        return F.relu(m.norms[1](y.detach()) + r)

    with torch.no_grad():
        report = bn.explain(Network(function), images())
    assert (report.graphs, report.left["norms.0"]) == (2, "it is returned")
    assert report.fused == {"norms.1": "add + relu"}
