"""A batch that lies on several processes, and what one process makes of all of it."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import TOLERANCES, as_numpy, parameter_dtype

import batchnorm as bn

#: What `torch.distributed` has that waits for other processes.
COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_gather_single", "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object",
    "monitored_barrier", "reduce", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_tensor", "recv", "scatter", "scatter_object_list", "send",
)  # fmt: skip

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def part(values, shares, rank, dim=0):
    """Return what a rank has of values along their examples, as a leaf of its own."""
    own = values.detach().narrow(dim, sum(shares[:rank]), shares[rank])
    return own.clone(memory_format=torch.preserve_format)


def layer_of(channels, dtype=torch.float64, kind=bn.SyncBatchNorm, **settings):
    """Return a layer with random parameters, the same on all ranks."""
    layer = kind(channels, dtype=parameter_dtype(dtype), **settings)
    seeded = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(channels, generator=seeded))
    return layer


def alone(layer):
    """Return a copy of a layer in float64 and for one process."""
    other = copy.deepcopy(layer).double()
    other.process_group = None
    return other


def step(layer, x, dy, residual=None, mask=None):
    """Return y and all gradients of a step, by name."""
    layer.zero_grad()
    y = layer(x, residual, mask)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    if residual is not None:
        found["dresidual"] = residual.grad
    return found | {f"d{name}": p.grad for name, p in layer.named_parameters()}


def assert_like_one(layer, rank, shares, x, dy, residual=None, mask=None, dim=0, times=1):
    """Assert that a step over all processes is that of one with the whole batch.

    The mask has the examples first. Returns what this rank found.
    """
    whole = alone(layer)
    wide = [None if v is None else v.to(torch.float64, copy=True) for v in (x, dy, residual)]
    expected = step(whole, *map(with_gradient, wide), mask)
    own = [None if v is None else part(v, shares, rank, dim) for v in (x, dy, residual)]
    own_mask = None if mask is None else part(mask, shares, rank)
    found = step(layer, *map(with_gradient, own), own_mask)
    for name, values in expected.items():
        largest = max(largest_of(values), largest_of(dy) if name == "dx" else 0)
        if name in ("dweight", "dbias"):
            total = found[name].double()
            dist.all_reduce(total)
            assert_named(name, total, values, parameter_dtype(x.dtype), times, largest)
        else:
            assert found[name].dtype == x.dtype
            values = part(values, shares, rank, dim)
            assert_named(name, found[name], values, x.dtype, times, largest)
    assert_statistics_like_one(layer, whole, parameter_dtype(x.dtype), times)
    return found


def with_gradient(values):
    """Return the same leaf, and let it have a gradient."""
    return None if values is None else values.requires_grad_()


def largest_of(values):
    """Return the largest absolute value that is not NaN."""
    return np.nan_to_num(np.abs(as_numpy(values))).max(initial=0)


def assert_named(name, actual, expected, dtype, times=1, largest=None):
    """Assert that values are those expected, or say which they are.

    Args:
        name: Of the values.
        actual: What was found.
        expected: What should be.
        dtype: Whose tolerance it is.
        times: How many times that.
        largest: What the error is relative to; the largest value expected if left out.
    """
    error = np.abs(as_numpy(actual) - as_numpy(expected)).max(initial=0)
    limit = times * TOLERANCES[dtype]["sum"] * (largest or max(largest_of(expected), 1e-3))
    assert actual.shape == expected.shape, name
    assert error <= limit, f"{name}, {dtype}: error {error:g}, at most {limit:g}"


def assert_statistics_like_one(layer, whole, dtype=torch.float64, times=1):
    """Assert that running statistics are those of one process, and the same bits everywhere."""
    for name in STATISTICS:
        values = getattr(layer, name)
        if values is not None:
            assert_named(name, values, getattr(whole, name), dtype, times)
    assert_same_everywhere(layer)


def assert_same_everywhere(module):
    """Assert that all buffers are the same bits on all ranks of the world."""
    for name, buffer in module.named_buffers():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, as_numpy(buffer).tobytes())
        assert len(set(every)) == 1, f"{name} is not the same everywhere"


def fails(call, kind, *words):
    """Return the message of the error that a call must raise, with these words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    return message


@contextmanager
def counted():
    """Yield a list, which gets the name of every collective that is called inside."""
    calls = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counting(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, counting(name, original))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
