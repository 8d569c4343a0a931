"""Loops of training around an accelerated model: parallel, scaled, in parts, in threads."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from models.accelerate.agreement import assert_same, step
from models.accelerate.networks import doubles, images, network
from models.holding import buffers_of
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn


def test_threads():
    (x, r), model = doubles(), network().eval()
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf, r), leaf, r)[0]
    fast, found = bn.accelerate(model, save_memory=True), []
    fast(leaf, r)

    def work():
        for _ in range(5):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(fast(leaf, r), leaf, r)[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for actual in found:
        assert_same({"dx": actual}, {"dx": expected}, 1e-12)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_data_parallel(inside, save_memory):
    inputs = doubles()
    expected = step(network(), inputs)
    if inside:
        model = DistributedDataParallel(bn.accelerate(network(), save_memory=save_memory))
    else:
        model = bn.accelerate(DistributedDataParallel(network()), save_memory=save_memory)
    assert_same(step(model, inputs), expected, 1e-12)


def test_scaled_losses():
    """Of automatic mixed precision; a step that is left out, too."""

    def losses(around):
        model = unscaled = network().float()
        run, optimizer = around(model), torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        found = []
        for at in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = run(x, r).square().mean() * (torch.inf if at == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.detach())
        return {"loss": torch.stack(found), **buffers_of(unscaled)}

    x, r = images()
    expected = losses(lambda model: model)
    assert_same(losses(lambda m: bn.accelerate(m, save_memory=True)), expected, 2**-7)


def test_accumulated_gradients():
    def gradients(run, model):
        model.zero_grad()
        for x, r in zip(xs.split(3), rs.split(3), strict=True):
            run(x, r).square().mean().backward()
        return dict(enumerate(p.grad for p in model.parameters()))

    xs, rs = doubles(6, 4, 5, 5)
    model = network()
    stock = copy.deepcopy(model)
    expected = gradients(stock, stock)
    assert_same(gradients(bn.accelerate(model, save_memory=True), model), expected, 1e-12)
