"""No call waits for a value of the device, shown on the device that has none to give.

Tensors on `meta` have a shape and a type and no values; to read one raises an error. So whatever
runs there asks the device for nothing, and no GPU is needed to see that.
"""

import subprocess
import sys
import textwrap

import pytest
import torch

import batchnorm as bn

LAYERS = {
    "plain": lambda: bn.BatchNorm(8, device="meta"),
    "average": lambda: bn.BatchNorm(8, momentum=None, device="meta"),
    "ghost": lambda: bn.GhostBatchNorm(8, ghost_size=3, device="meta"),
    "renorm": lambda: bn.BatchRenorm(8, device="meta"),
    "frozen": lambda: bn.FrozenBatchNorm(8, device="meta"),
    "bank": lambda: bn.BankedBatchNorm(8, banks=("a", "b"), device="meta"),
}


def step(layer, mask):
    x = torch.randn(10, 8, 4, 4, device="meta", requires_grad=True)
    weights = torch.rand(10, 1, 1, device="meta").round() if mask else None
    layer(x, mask=weights).square().mean().backward()
    return x.grad


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step(name, mask):
    assert step(LAYERS[name](), mask).shape == (10, 8, 4, 4)


def test_a_transaction():
    layer = bn.BatchNorm(8, device="meta")
    with bn.transaction(layer) as t:
        step(layer, mask=True)
        step(layer, mask=False)
        t.commit()


def test_reading_a_value_would_be_seen():
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()


def test_a_synchronized_step():
    program = """
    import torch, torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    import batchnorm as bn

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    for layer in (bn.SyncBatchNorm(8), bn.SyncBatchNorm(8, ghost_size=3)):
        layer._agreed = True  # at its first call it reads how many channels the others have
        layer.to("meta")
        x = torch.randn(10, 8, 4, 4, device="meta", requires_grad=True)
        layer(x).square().mean().backward()
        assert x.grad.shape == x.shape
    print("no value was read")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "no value was read" in done.stdout, done.stderr
