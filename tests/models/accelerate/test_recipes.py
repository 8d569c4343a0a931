"""What is kept in place of a tensor: made again at any time, watched, and given back."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from models.accelerate.agreement import assert_agrees, assert_same, step
from models.accelerate.networks import blocks, doubles, images, network, start
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.models.accelerate.recompute import Kept, Recipe, Waiting


class Mark:
    """Something to see whether what has it is still there."""


def mark(y):
    """Return whether the graph of a result is still there, when called."""
    y.grad_fn.metadata["mark"] = made = Mark()
    return weakref.ref(made)


def test_memory_is_given_back():
    (x, r), model = doubles(), network(blocks)
    fast = bn.accelerate(model, save_memory=True)

    def alive():
        return [type(v) for v in gc.get_objects() if type(v) in (Kept, Recipe, Waiting)]

    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        for _ in range(2):
            y = fast(x, r)
            made = mark(y)
            assert Waiting in alive()
            y.backward(torch.ones_like(y))
            assert alive() == []
            del y
            fast(x, r)  # whose result is dropped
            assert (alive(), made()) == ([], None)
    finally:
        gc.enable()


def test_what_is_made_is_given_back_in_the_backward_pass():
    """It goes as soon as nothing waits for it, and not with the whole graph at the end."""
    (x, r), model, made = doubles(), network(blocks), []

    def count(_):
        recipes = [v for v in gc.get_objects() if type(v) is Recipe]
        made.append((len(recipes), sum(v._made is not None for v in recipes)))

    y = bn.accelerate(model, save_memory=True)(x.requires_grad_(), r)
    gc.collect()
    gc.disable()
    try:
        y.register_hook(count)
        x.register_hook(count)  # called last
        y.backward(torch.ones_like(y))
    finally:
        gc.enable()
    assert made == [(6, 0), (0, 0)]


def test_nothing_of_the_network_is_kept_by_a_cycle():
    """What exp keeps is its own output, which would hold the graph that holds it."""

    def function(m, x, r):
        y = start(m, x).exp()
        return m.convs[1](y).exp()

    (x, r), model = doubles(), network(function)
    fast = bn.accelerate(model, save_memory=True)
    fast(x, r)
    gc.collect()
    gc.disable()
    try:
        made = mark(fast(x, r))
        assert made() is None
    finally:
        gc.enable()


def test_the_backward_pass_may_be_done_again():
    (x, r, dy), model = doubles(n=3), network(blocks)
    fast = bn.accelerate(copy.deepcopy(model), save_memory=True)
    found = []
    for run in (model, fast):
        y = run(x, r)
        for upstream in (dy, 2 * dy):
            y.backward(upstream, retain_graph=True)
        y.backward(-dy)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward(dy)
        found.append(dict(enumerate(p.grad for p in run.parameters())))
    assert_same(*found[::-1], 1e-12)


@pytest.mark.parametrize("backwards", [False, True])
def test_several_forward_passes_before_the_backward_passes(backwards):
    (x, r, dy), model = doubles(n=3), network(blocks)
    fast = bn.accelerate(copy.deepcopy(model), save_memory=True)
    found = []
    for run in (model, fast):
        ys = [run(x, r), run(r, x), run(2 * x, r)]
        for y in ys[::-1] if backwards else ys:
            y.backward(dy)
        found.append(dict(enumerate(p.grad for p in run.parameters())))
    assert_same(*found[::-1], 1e-12)


def test_the_backward_pass_in_another_thread():
    (x, r, dy), model = doubles(n=3), network(blocks)
    expected = torch.autograd.grad(model(x, r), list(model.parameters())[:2], dy)
    y, found = bn.accelerate(model, save_memory=True)(x, r), []

    def work():
        found.extend(torch.autograd.grad(y, list(model.parameters())[:2], dy))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 1e-12)


def test_hooks_of_others_decide():
    """What is kept goes through theirs, and may be anywhere."""
    (x, r), model = doubles(), network(blocks)
    stock, packed = copy.deepcopy(model), []
    fast = bn.accelerate(model, save_memory=True)

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    for around in (
        lambda: torch.autograd.graph.save_on_cpu(),
        lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept),
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    ):
        expected = step(stock, [x, r])
        with around():
            assert_same(step(fast, [x, r]), expected, 1e-12)
    assert len(packed) >= 12


def test_hooks_inside_the_model():
    def function(m, x, r):
        y = start(m, x)
        with torch.autograd.graph.save_on_cpu():
            y = F.relu(m.norms[1](m.convs[1](y)) + y)
        return m.convs[2](y)

    assert_agrees(network(function), images(), steps=1)


def test_what_is_kept_is_watched():
    """Autograd looks by itself only after what goes through no hooks."""
    (x, r, dy), model = doubles(n=3), network()
    fast = bn.accelerate(model, save_memory=True)
    for name in ("norms.0.weight", "norms.1.bias", "convs.1.weight", "convs.2.weight"):
        y = fast(x, r)
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match=r"expected version \d+\. Do not change it"):
            y.backward(dy)
    y = fast(x, r)
    with torch.no_grad():
        for buffer in model.buffers():  # of which nothing is kept
            buffer.add_(1)
    y.backward(dy)
