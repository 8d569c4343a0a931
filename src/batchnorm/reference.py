"""Batch normalization in NumPy float64: the equations as code, and so the specification.

Every kernel, layer and tool of the package is tested against this file. It wants to be read,
from top to bottom, by someone who knows the equations and nothing else:

    mu   = (1/m) sum x                  var = (1/(m - correction)) sum (x - mu)^2
    xhat = (x - mu) / sqrt(var + eps)   y   = activation(gamma * xhat + beta + residual)

The sums run over all dimensions of `x` but one, `axis`, the channels': over the examples for a
dense layer (N, C), over the examples and all pixels for a convolutional one (N, C, H, W). That
one dimension is left out is all the difference there is between the two.

The two worked examples of the lecture notes:

>>> x = np.array([[3.0], [5], [8], [9], [11], [24]])
>>> found = moments(x)
>>> found.mean, found.var()
(array([10.]), array([46.]))
>>> forward(x).ravel().round(2)
array([-1.03, -0.74, -0.29, -0.15,  0.15,  2.06])

>>> small, large = np.array([[2.0], [0], [2], [4]]), np.array([[200.0], [0], [200], [400]])
>>> gamma, beta = np.array([3.0]), np.array([1.0])
>>> forward(small, gamma, beta, eps=0).ravel()  # beta, beta - sqrt(2) gamma, beta, ...
array([ 1.        , -3.24264069,  1.        ,  5.24264069])
>>> np.allclose(forward(large, gamma, beta, eps=0), forward(small, gamma, beta, eps=0))
True
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
EpsPlacement = Literal["variance", "deviation"]
Convention = Literal["torch", "keras"]


@dataclass(frozen=True)
class Moments:
    """What is known of a batch: how many values a channel has, their mean, their spread.

    Attributes:
        count: Number of values per channel, or the sum of their weights; a scalar.
        mean: Their mean, (C,).
        m2: The sum of their squared distances from the mean, (C,).
    """

    count: float
    mean: Array
    m2: Array

    def var(self, correction: float = 0) -> Array:
        """Return m2 / (count - correction), (C,); 0 where there are too few values for it."""
        degrees = self.count - correction
        return self.m2 / degrees if degrees > 0 else np.zeros_like(self.m2)


def moments(x: ArrayLike, axis: int = 1, weights: ArrayLike | None = None) -> Moments:
    """Return the moments of every channel of a batch.

    Args:
        x: The batch, with its channels along `axis`.
        axis: The channels' dimension.
        weights: How often each position counts, of a shape that broadcasts over the positions (all
            dimensions of `x` but the channels'): a mask of 0 and 1, or any weights >= 0. A value of
            weight 0 is not there: not even NaN or an infinity matters.
    """
    rows, weight, _ = _rows(x, axis, weights)
    count = float(weight.sum())
    if count == 0:
        return Moments(0.0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
    mean = (weight * rows).sum(axis=0) / count
    return Moments(count, mean, (weight * (rows - mean) ** 2).sum(axis=0))


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of two batches taken together, exactly (Chan, Golub & LeVeque 1979).

    >>> batch = np.array([[3.0], [5], [8], [9], [11], [24]])
    >>> merge(moments(batch[:2]), moments(batch[2:]))
    Moments(count=6.0, mean=array([10.]), m2=array([276.]))
    """
    count = a.count + b.count
    if count == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + delta**2 * (a.count * b.count / count))


class Options(TypedDict, total=False):
    """What `forward` and `backward` take by keyword.

    Attributes:
        axis: The channels' dimension; 1 if left out.
        eps: What keeps the division from failing where a channel is constant; 1e-5.
        eps_placement: `variance` (the default) divides by sqrt(var + eps), `deviation` by
            sqrt(var) + eps.
        correction: 0 (the default) divides the sum of squares by m, 1 by m - 1.
        weights: How much each position counts in the moments; see `moments`. Every position is
            normalized, whatever its weight. Where all weights are 0 there is nothing to normalize
            by, and xhat is 0.
        residual: Added before the activation, of the shape of `x`.
        activation: A key of `ACTIVATIONS`.
        parameter: The slope of `leaky_relu` or the alpha of `elu`.
        running: (mean, variance) to normalize by in place of the batch's own: inference.
    """

    axis: int
    eps: float
    eps_placement: EpsPlacement
    correction: float
    weights: ArrayLike | None
    residual: ArrayLike | None
    activation: str | None
    parameter: float | None
    running: tuple[ArrayLike, ArrayLike] | None


def forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Array:
    """Normalize a batch.

    Args:
        x: The batch, with its channels along `axis`.
        gamma: The scale of each channel, (C,); 1 if left out.
        beta: The shift of each channel, (C,); 0 if left out.
        options: See `Options`.
    """
    done = _normalize(x, gamma, beta, **options)
    return done.shaped(done.function(done.z))


class Gradients(NamedTuple):
    """The derivatives of a loss by everything that went into `forward`."""

    x: Array
    gamma: Array
    beta: Array
    residual: Array


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """Return the gradients of a loss, given `dy`, its gradient by what `forward` returned.

    With g = dy * activation'(z), which is dy itself without an activation:

        dbeta = sum g         dgamma = sum g * xhat         dresidual = g
        dx = gamma / sqrt(var + eps) * (g - dbeta / m - xhat * dgamma / (m - correction))

    With `running` moments nothing flows back through them: dx = gamma / sqrt(var + eps) * g.
    """
    done = _normalize(x, gamma, beta, **options)
    found, scale, distance, inverse = done.moments, done.scale, done.distance, done.inverse
    g = _matrix(dy, options.get("axis", 1)) * done.derivative(done.z)
    dbeta, dgamma = g.sum(axis=0), (g * distance * inverse).sum(axis=0)
    dx = scale * inverse * g
    if found.count > 0:  # the batch's own moments: they, too, depend on x
        dx -= done.weight * scale * inverse * dbeta / found.count
    if found.count > options.get("correction", 0):
        if options.get("eps_placement", "variance") == "variance":
            slope = inverse**3
        else:  # d(1/(s + eps))/dvar = -1/(2 s (s + eps)^2), and a constant channel has s = 0
            deviation = np.sqrt(found.var(options.get("correction", 0)))
            slope = np.divide(inverse**2, deviation, where=deviation > 0, out=0 * deviation)
        sums = (g * distance).sum(axis=0) / (found.count - options.get("correction", 0))
        dx -= done.weight * scale * slope * distance * sums
    dx = np.where(done.absent, 0, dx)
    return Gradients(done.shaped(dx), dgamma, dbeta, done.shaped(g))


def update(
    running: tuple[ArrayLike, ArrayLike],
    found: Moments,
    momentum: float = 0.1,
    convention: Convention = "torch",
) -> tuple[Array, Array]:
    """Return the running mean and variance after one more batch.

    The running variance takes the unbiased estimate, m2 / (m - 1), so that it aims at the variance
    of the data and not of a batch. A batch that has no such estimate (m <= 1), or one that is not
    finite, leaves both as they are.

    Args:
        running: The mean and the variance so far, each (C,).
        found: The batch's moments.
        momentum: How much the new batch counts (`torch`), or how much the old average (`keras`).
        convention: `torch`: new = (1 - momentum) * old + momentum * batch;
            `keras`: new = momentum * old + (1 - momentum) * batch.

    >>> batch = moments(np.array([[3.0], [5], [8], [9], [11], [24]]))
    >>> update((np.zeros(1), np.ones(1)), batch, 0.1)
    (array([1.]), array([6.42]))
    >>> update((np.zeros(1), np.ones(1)), batch, 0.9, convention="keras")
    (array([1.]), array([6.42]))
    """
    mean, var = np.asarray(running[0], np.float64), np.asarray(running[1], np.float64)
    if found.count <= 1 or not np.isfinite([found.mean, found.m2]).all():
        return mean, var
    new = momentum if convention == "torch" else 1 - momentum
    return (1 - new) * mean + new * found.mean, (1 - new) * var + new * found.var(correction=1)


class _Pass(NamedTuple):
    """All that a forward pass computed; matrices have a row a position, a column a channel."""

    z: Array  # what goes into the activation
    scale: Array  # gamma, (C,)
    distance: Array  # x - mu
    inverse: Array  # 1 / sqrt(var + eps), (C,)
    weight: Array  # (rows, 1)
    absent: NDArray[np.bool_]  # of weight 0 and not finite
    moments: Moments  # the batch's; none, if it was normalized by running ones
    function: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    shaped: Callable[[Array], Array]  # gives a matrix the shape of x


def _normalize(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    eps_placement: EpsPlacement = "variance",
    correction: float = 0,
    weights: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    parameter: float | None = None,
    running: tuple[ArrayLike, ArrayLike] | None = None,
) -> _Pass:
    rows, weight, absent = _rows(x, axis, weights)
    if running is None:
        found = moments(x, axis, weights)
        mean, var = found.mean, found.var(correction)
    else:
        mean, var = _float64(running[0]), _float64(running[1])
        found = Moments(0.0, np.zeros_like(mean), np.zeros_like(mean))
    if eps_placement == "variance":
        inverse = 1 / np.sqrt(var + eps)
    elif eps_placement == "deviation":
        inverse = 1 / (np.sqrt(var) + eps)
    else:
        raise ValueError(f"eps_placement is {eps_placement!r}: expected 'variance' or 'deviation'")
    if running is None and found.count == 0:
        inverse = np.zeros_like(mean)
    scale = np.ones_like(mean) if gamma is None else _float64(gamma)
    z = scale * ((rows - mean) * inverse)
    if beta is not None:
        z = z + _float64(beta)
    if residual is not None:
        z = z + _matrix(residual, axis)
    function, derivative = _activation(activation, parameter)
    moved = np.moveaxis(_float64(x), axis, -1).shape
    return _Pass(
        z, scale, rows - mean, inverse, weight, absent, found, function, derivative,
        shaped=lambda rows: np.moveaxis(rows.reshape(moved), -1, axis),
    )  # fmt: skip


def _float64(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def _matrix(x: ArrayLike, axis: int) -> Array:
    """Return `x` as a matrix: a row a position, a column a channel."""
    moved = np.moveaxis(_float64(x), axis, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])


def _rows(
    x: ArrayLike, axis: int, weights: ArrayLike | None
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return `x` as a matrix, the weight of each row, and what is absent and so read as 0."""
    rows = _matrix(x, axis)
    weight = np.ones((len(rows), 1))
    if weights is not None:
        positions = np.moveaxis(_float64(x), axis, -1).shape[:-1]
        weight = np.broadcast_to(_float64(weights), positions).reshape(-1, 1)
    absent = (weight == 0) & ~np.isfinite(rows)
    return np.where(absent, 0, rows), weight, absent


def _sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))  # never overflows
    return np.asarray(np.where(z >= 0, 1, e) / (1 + e))


def _normal_cdf(z: Array) -> Array:
    return np.asarray(0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))))


def _normal_pdf(z: Array) -> Array:
    return np.asarray(np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))


#: Name -> (its parameter's default, the function, its derivative), each of z and the parameter.
ACTIVATIONS: dict[str, tuple[float | None, Callable[..., Array], Callable[..., Array]]] = {
    "relu": (None, lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "leaky_relu": (
        0.01,
        lambda z, slope: np.where(z > 0, z, slope * z),
        lambda z, slope: np.where(z > 0, 1.0, slope),
    ),
    "elu": (
        1.0,
        lambda z, alpha: np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0))),
        lambda z, alpha: np.where(z > 0, 1.0, alpha * np.exp(np.minimum(z, 0))),
    ),
    "silu": (
        None,
        lambda z: z * _sigmoid(z),
        lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
    ),
    "gelu": (
        None,
        lambda z: z * _normal_cdf(z),
        lambda z: _normal_cdf(z) + z * _normal_pdf(z),
    ),
    "sigmoid": (None, _sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z))),
    "tanh": (None, np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}


def _activation(
    name: str | None, parameter: float | None
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return an activation and its derivative; without a name, the identity."""
    if name is None:
        return (lambda z: z), np.ones_like
    default, function, derivative = ACTIVATIONS[name]
    arguments: tuple[Any, ...] = ()
    if default is not None:
        arguments = (default if parameter is None else parameter,)
    return (lambda z: function(z, *arguments)), (lambda z: derivative(z, *arguments))
