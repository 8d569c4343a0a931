"""What the tests share: the tolerances, and a layer's whole step by the reference."""

import numpy as np
import torch

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
