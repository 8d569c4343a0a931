"""What the tests share: the tolerances, and a layer's whole step by the reference."""

import threading

import numpy as np
import torch

import batchnorm as bn
from batchnorm import Moments, reference
from batchnorm.kernels import Form

#: Largest error relative to the largest value expected: one row a type, for values (rounded once
#: from float32 or float64 arithmetic) and for what was summed over a batch of up to 1e5 values.
TOLERANCES = {
    torch.float64: {"value": 1e-13, "sum": 1e-12},
    torch.float32: {"value": 1e-6, "sum": 2e-6},
    torch.bfloat16: {"value": 2**-8, "sum": 2**-8},
    torch.float16: {"value": 2**-11, "sum": 2**-11},
}

FLOATS = tuple(TOLERANCES)
HALVES = (torch.bfloat16, torch.float16)
ACTIVATIONS = (
    None,
    "relu",
    ("leaky_relu", 0.2),
    ("elu", 0.7),
    "silu",
    "gelu",
    "sigmoid",
    "tanh",
    "relu6",
    "hardswish",
)

#: Shape, channel dimension, memory format.
LAYOUTS = {
    "NC": ((33, 5), 1, torch.contiguous_format),
    "NCL": ((6, 5, 7), 1, torch.contiguous_format),
    "NCHW": ((4, 5, 6, 7), 1, torch.contiguous_format),
    "NHWC": ((4, 5, 6, 7), 1, torch.channels_last),
    "NCDHW": ((2, 5, 3, 4, 5), 1, torch.contiguous_format),
    "NDHWC": ((2, 5, 3, 4, 5), 1, torch.channels_last_3d),
    "channels at the end": ((4, 6, 7, 5), -1, torch.contiguous_format),
    "channels in front": ((5, 40), 0, torch.contiguous_format),
}


def assert_close(actual, expected, dtype, kind="value", scale=1.0):
    """Assert that the largest error is within the table's row, relative to the largest value."""
    actual, expected = as_numpy(actual), as_numpy(expected)
    assert actual.shape == expected.shape
    if expected.size == 0:
        return
    largest = max(np.abs(expected).max(), 1e-3) * scale
    error = np.abs(actual - expected).max()
    assert error <= TOLERANCES[dtype][kind] * largest, (
        f"error {error:g}, relative {error / largest:g}"
    )


def as_numpy(values):
    """Return a tensor or array as float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, np.float64)


def parameter_dtype(dtype):
    """Return the type that a layer's parameters have for a batch of some type."""
    return torch.float32 if dtype in HALVES else dtype


def named(activation):
    """Return an activation as the reference takes it."""
    if isinstance(activation, tuple):
        return {"activation": activation[0], "parameter": activation[1]}
    return {"activation": activation}


def activate(activation, z):
    """Return what torch computes for an activation."""
    if activation is None:
        return z
    name, *parameter = (activation,) if isinstance(activation, str) else activation
    function = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(name)
    return (function or getattr(torch.nn.functional, name))(z, *parameter)


def make(shape, channel_dim, memory_format, dtype, mean=0.7):
    """Return x, weight, bias, residual, dy: random, and exactly representable in the type."""
    channels = shape[channel_dim]
    x, residual, dy = (
        torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=memory_format)
        for _ in range(3)
    )
    weight, bias = (torch.randn(channels).to(parameter_dtype(dtype)) for _ in range(2))
    return (x * 2 + mean).to(dtype), weight, bias, residual, dy


#: The backends that serve here, by their names.
SERVING = {
    b.name: b
    for b in bn.backends()
    if (b.available() or b.supports(torch.zeros(2, 3), Form())) is None
}
BACKENDS = tuple(SERVING)


def ghost_sizes(layout):
    """Return two sizes of groups for a layout of the table, one of which leaves a rest.

    No group has two values per channel: there, dx would be what rounding leaves of it.
    """
    return (4, 3) if len(LAYOUTS[layout][0]) == 2 else (1, 3)


def weights_of(shape, channel_dim):
    """Return a mask of the weights 0, 1 and 2 over the positions."""
    positions = list(shape)
    del positions[channel_dim]
    return torch.randint(0, 3, positions)


def step(function, x, weight, bias, residual, dy):
    """Return y and the gradients of what a function takes, which are all but dy."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias, residual)]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, dy)


def layer_step(layer, x, weight, bias, residual, dy, mask=None):
    """Return y and the gradients, of a layer with these numbers."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    leaves = [v.clone().requires_grad_() for v in (x, residual)]
    y = layer(*leaves, mask)
    dx, dresidual, *channels = torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], dy)
    return y, dx, *channels, dresidual


def expected_step(x, weight, bias, residual, dy, activation=None, **options):
    """Return the same by the reference."""
    arguments = [as_numpy(v) for v in (x, weight, bias)]
    if options.get("weights") is not None:
        options["weights"] = as_numpy(options["weights"])
    options = {**options, **named(activation), "residual": as_numpy(residual)}
    gradients = reference.backward(as_numpy(dy), *arguments, **options)
    return reference.forward(*arguments, **options), *gradients


def assert_steps_close(actual, expected, dtype):
    """Assert that y and the gradients of x, weight, bias and residual are within the table."""
    wide = parameter_dtype(dtype)
    kinds = (dtype, "value"), (dtype, "value"), (wide, "sum", 10), (wide, "sum", 10)
    for mine, truth, kind in zip(actual, expected, (*kinds, (dtype, "value")), strict=True):
        assert mine.dtype == kind[0]
        assert_close(mine, truth, *kind)


def expected_running(running, x, momentum=0.1, axis=1, weights=None):
    """Return the running mean and variance after a batch, by the reference."""
    found = reference.moments(as_numpy(x), axis=axis, weights=weights)
    return reference.update([as_numpy(v) for v in running], found, momentum)


class Together:
    """Threads that are normalized together, in place of the processes of a group.

    Args:
        size: Their number.
    """

    def __init__(self, size):
        self.barrier, self.given = threading.Barrier(size), [None] * size

    def run(self, function):
        """Return function(rank, pool) of every rank, each called in a thread of its own."""
        found, errors = [None] * len(self.given), []

        def work(rank):
            try:
                found[rank] = function(rank, Member(self, rank))
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=[rank]) for rank in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:  # the first; those of the others come of it
            raise errors[0]
        return found

    def exchange(self, rank, own):
        """Return what all ranks gave, in their order."""
        self.given[rank] = own
        self.barrier.wait(timeout=20)
        everything = list(self.given)
        self.barrier.wait(timeout=20)
        return everything


class Member:
    """The pool of one rank of `Together`."""

    def __init__(self, together, rank):
        self.together, self.rank = together, rank

    def moments(self, own):
        """Return the moments of all ranks."""
        return Moments.sum(self.together.exchange(self.rank, own))

    def sums(self, sum_g, sum_g_xhat):
        """Return the two sums over all ranks."""
        everything = self.together.exchange(self.rank, (sum_g, sum_g_xhat))
        return tuple(torch.stack(each).sum(0) for each in zip(*everything, strict=True))
