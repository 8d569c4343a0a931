"""The backend of `torch.compile`: graphs, breaks, sizes, modes, options, and what is around it."""

import copy

import pytest
import torch
from models.accelerate.agreement import assert_agrees, assert_same, step
from models.accelerate.networks import chained, doubles, images, network
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.models.accelerate.backend import backend

NON_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf"


@pytest.mark.filterwarnings(NON_LEAF)
def test_breaks_of_the_graph():
    def function(m, x, r):
        y = m.norms[0](x)
        torch._dynamo.graph_break()
        z = F.relu(m.norms[1](y) + r)
        if z.sum() > 0:
            z = F.relu(m.norms[2](z) + y)
        print(end="")
        return z

    found = assert_agrees(network(function), images())
    assert found == ["it is returned", "add + relu", "add + relu"]


@pytest.mark.parametrize("dynamic", [True, None])
def test_sizes_that_change(dynamic):
    def function(m, x, r):
        return chained(m, x, r).flatten(1).view(x.shape[0], -1)

    model, graphs = network(function), []

    def counted(module, inputs):
        graphs.append(module)
        return backend(module, inputs, options={"save_memory": True})

    stock = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counted, dynamic=dynamic)
    for size in (3, 5, 7, 4):
        inputs = doubles(size, 4, 5, 5)
        assert_same(step(compiled, inputs), step(stock, inputs), 1e-12)
    assert len(graphs) == (1 if dynamic else 2)


def test_modes_that_change():
    model, inputs = network(), doubles()
    stock, compiled = copy.deepcopy(model), bn.accelerate(model)
    for training in (True, False, True):
        compiled.train(training)
        assert_same(step(compiled, inputs), step(stock.train(training), inputs), 1e-12)
    assert not compiled.eval().norms[0].training
    with torch.inference_mode():
        y = compiled(*inputs)
    assert_same({"output": y}, {"output": stock.eval()(*inputs).detach()}, 1e-12)


def _by_name(model):
    return torch.compile(model, backend="batchnorm", options={"save_memory": True}, fullgraph=True)


def _in_place(model):
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize(
    "compiled",
    [
        bn.accelerate,
        lambda model: bn.accelerate(model, save_memory=True, dynamic=True),
        _by_name,
        _in_place,
        lambda model: torch.compile(model, backend=backend, mode="reduce-overhead"),
        lambda model: bn.accelerate(model, inner="eager"),
        lambda model: bn.accelerate(model, inner="aot_eager"),
        lambda model: bn.accelerate(model, inner="aot_eager", save_memory=True),
        lambda model: copy.deepcopy(bn.accelerate(model)),
        lambda model: nn.Sequential(bn.accelerate(model))[0],
    ],
    ids=[
        "accelerate", "dynamic", "by name", "compile", "mode", "inner", "aot", "aot, saving memory",
        "copied", "inside",
    ],
)  # fmt: skip
def test_ways_to_compile(compiled):
    model, inputs = network(), doubles()
    stock = copy.deepcopy(model)
    fast = compiled(model)
    for seed in range(2):
        assert_same(step(fast, inputs, seed), step(stock, inputs, seed), 1e-12)


def test_it_shares_the_state_of_the_model():
    model = network()
    fast = bn.accelerate(model)
    step(fast, doubles())
    assert {k.removeprefix("_orig_mod."): v for k, v in fast.state_dict().items()}.keys() == (
        model.state_dict().keys()
    )
    assert all(v is w for v, w in zip(fast.parameters(), model.parameters(), strict=True))
    assert model.norms[0].num_batches_tracked == 1


def test_options_that_are_not():
    with pytest.raises(Exception, match=r"no option 'speed': expected inner or save_memory"):
        torch.compile(network(), backend=backend, options={"speed": 1})(*doubles())
    with pytest.raises(Exception, match="Invalid backend: 'none'"):
        bn.accelerate(network(), inner="none")(*doubles())


def test_errors_of_the_model_are_its_own():
    def function(m, x, r):
        y = F.relu(m.norms[0](x) + r)
        if x.shape[0] == 2:
            raise KeyError("two")
        return y

    (x, r), model = doubles(), network(function)
    found = []
    for run in (copy.deepcopy(model), bn.accelerate(model, save_memory=True)):
        with pytest.raises(KeyError, match="two"):
            run(x[:2], r[:2])
        with pytest.raises(ValueError, match="expected 4D input"):
            run(x[0], r[0])
        found.append(step(run, [x, r]))
    assert_same(*found[::-1], 1e-12)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
