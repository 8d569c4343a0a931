"""A model and its accelerated twin, run side by side on the same numbers."""

import copy
import math

import torch
from models.holding import buffers_of
from torch.utils import _pytree as pytree

from batchnorm.models.accelerate.backend import backend
from batchnorm.models.accelerate.chains import find_chains

#: The options of the backend.
WAYS = {"fused": {}, "saving memory": {"save_memory": True}}


class Ways:
    """A backend of `torch.compile` whose graphs, captured once, run as each option has it.

    Attributes:
        way: The one that they run by.
        chains: What was found in them: `"add + relu"`, or why a batch norm runs alone.
        compiled: The model that was compiled.
    """

    def __init__(self):
        self.way, self.chains, self.compiled = "fused", [], None

    def compile(self, model):
        """Return a model that runs by the way of the time."""
        self.compiled = torch.compile(model, backend=self)
        return self.compiled

    def __call__(self, module, inputs):
        """Return what runs a graph."""
        self.chains += [described(chain) for chain in find_chains(module.graph)]
        runs = {
            way: backend(copy.deepcopy(module), inputs, options=options)
            for way, options in WAYS.items()
        }
        return lambda *inputs: runs[self.way](*inputs)


def described(chain):
    """Return what a batch norm runs with, or why it runs with nothing."""
    parts = ["add"] if chain.residual is not None else []
    parts += [chain.activation[0]] if chain.activation is not None else []
    return " + ".join(parts) or chain.ended


def step(model, inputs, seed=0):
    """Return all that a step gives: outputs, gradients of inputs and parameters, buffers."""
    given = [
        v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for v in inputs
    ]
    model.zero_grad()
    torch.manual_seed(seed)  # of dropout
    outputs = [y for y in pytree.tree_leaves(model(*given)) if torch.is_tensor(y)]
    recorded = [y for y in outputs if y.requires_grad]
    if recorded:
        random = torch.Generator().manual_seed(seed)
        upstream = [torch.randn(y.shape, generator=random).to(y) for y in recorded]
        torch.autograd.backward(recorded, upstream)
    gradients = [getattr(v, "grad", None) for v in given] + [p.grad for p in model.parameters()]
    found = {"output": outputs, "gradient": gradients, "buffer": buffers_of(model).values()}
    return {
        f"{kind} {at}": None if v is None else v.detach().clone()
        for kind, values in found.items()
        for at, v in enumerate(values)
    }


def assert_same(actual, expected, error):
    """Assert that two steps gave the same, to an error relative to the largest value of each.

    Gradients that are 0 but for rounding, as of a bias before a batch norm, count by the others.
    """
    assert actual.keys() == expected.keys()
    floor = max((_largest(v) for v in expected.values() if v is not None), default=0) / 100
    wrong = {
        name: f"error {found:g}"
        for name, truth in expected.items()
        if (found := _error(actual[name], truth, floor)) > error
    }
    assert not wrong, wrong


def _largest(tensor):
    finite = tensor[tensor.isfinite()]
    return float(finite.double().abs().max()) if finite.numel() else 0.0


def _error(actual, truth, floor):
    if actual is None or truth is None:
        return 0.0 if actual is truth else math.inf
    if (actual.shape, actual.dtype, actual.stride()) != (truth.shape, truth.dtype, truth.stride()):
        return math.inf
    odd = ~truth.isfinite()
    if not torch.equal(actual[odd].nan_to_num(7), truth[odd].nan_to_num(7)):
        return math.inf
    return _largest(actual.double() - truth.double()) / max(_largest(truth), floor, 1e-300)


def assert_agrees(model, inputs, *, steps=2, error=1e-12, ways=None):
    """Assert that a model in float64 gives the same as it is, fused, and saving memory.

    Saving memory, it gives what it does fused bit for bit.

    Args:
        model: The model.
        inputs: Of its call.
        steps: How many are compared.
        error: The largest one.
        ways: The ways to run it, to be used again.

    Returns:
        What was found in its graphs.
    """
    model = model.double()
    inputs = [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in inputs]
    ways, before = ways or Ways(), copy.deepcopy(model.state_dict())
    expected = [step(model, inputs, seed) for seed in range(steps)]
    compiled, found = ways.compile(model), {}
    for ways.way in WAYS:
        model.load_state_dict(before)
        found[ways.way] = [step(compiled, inputs, seed) for seed in range(steps)]
        for actual, truth in zip(found[ways.way], expected, strict=True):
            assert_same(actual, truth, error)
    for saving, fused in zip(found["saving memory"], found["fused"], strict=True):
        assert_same(saving, fused, 0)
    return ways.chains
