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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


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
    distance = np.where(weight == 0, 0, rows - mean)
    return Moments(count, mean, (weight * distance**2).sum(axis=0))


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


def groups(shape: tuple[int, ...], axis: int, ghost_size: int) -> list[int]:
    """Return how many examples each group of a ghost batch has, in their order.

    The examples lie along the first dimension that is not the channels'. Every group has
    `ghost_size` of them but the last, which has the rest. A rest of a single value per channel has
    no variance, and joins the group before it.

    >>> groups((10, 3, 5, 5), axis=1, ghost_size=4)
    [4, 4, 2]
    >>> groups((9, 3), axis=1, ghost_size=4)
    [4, 5]
    """
    examples, *others = np.delete(shape, axis).tolist()
    full, rest = divmod(examples, ghost_size)
    if rest * math.prod(others) == 1 and full:
        return [ghost_size] * (full - 1) + [ghost_size + 1]
    return [ghost_size] * full + [rest] * (rest > 0 or not full)


def renorm(
    mean: Array,
    inverse_std: Array,
    running: tuple[ArrayLike, Array],
    limits: tuple[float, float],
) -> tuple[Array, Array]:
    """Return r and d, by which batch renormalization corrects xhat to r * xhat + d (Ioffe 2017).

        r = clip(std / running_std, 1 / r_max, r_max)
        d = clip((mean - running_mean) / running_std, -d_max, d_max)

    Within the limits r * xhat + d is (x - running_mean) / running_std.

    Args:
        mean: The batch's, (C,).
        inverse_std: The batch's 1 / std, (C,); 0 if it has no values, and nothing is corrected.
        running: The running mean and 1 / running_std, each (C,).
        limits: r_max, at least 1, and d_max, at least 0.

    >>> one = np.ones(1)
    >>> renorm(12 * one, one / 2, (10 * one, one / 4), (3, 5))  # 12, 2 where 10, 4 are usual
    (array([0.5]), array([0.5]))
    >>> renorm(12 * one, one / 2, (10 * one, one / 4), (1.25, 0.1))
    (array([0.8]), array([0.1]))
    """
    r_max, d_max = limits
    there = inverse_std > 0
    r = np.divide(running[1], inverse_std, where=there, out=np.ones_like(mean))
    d = np.where(there, (mean - _float64(running[0])) * running[1], 0)
    return np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max)


@dataclass(frozen=True)
class Options:
    """What `forward` and `backward` take by keyword.

    Attributes:
        axis: The channels' dimension.
        eps: What keeps the division from failing where a channel is constant.
        eps_placement: `variance` divides by sqrt(var + eps), `deviation` by sqrt(var) + eps.
        correction: 0 divides the sum of squares by m, 1 by m - 1.
        weights: How much each position counts in the moments; see `moments`. Every position is
            normalized, whatever its weight. Where all weights are 0 there is nothing to normalize
            by, and xhat is 0.
        residual: Added before the activation, of the shape of `x`.
        activation: A key of `ACTIVATIONS`.
        parameter: The slope of `leaky_relu` or the alpha of `elu`.
        running: (mean, variance) to normalize by in place of the batch's own: inference.
        renorm: (r_max, d_max): the batch's own moments normalize, and xhat is corrected towards
            what the `running` ones would give; see `renorm`.
        ghost_size: So many consecutive examples are normalized as if they were a batch; see
            `groups`.
    """

    axis: int = 1
    eps: float = 1e-5
    eps_placement: Literal["variance", "deviation"] = "variance"
    correction: float = 0
    weights: ArrayLike | None = None
    residual: ArrayLike | None = None
    activation: str | None = None
    parameter: float | None = None
    running: tuple[ArrayLike, ArrayLike] | None = None
    renorm: tuple[float, float] | None = None
    ghost_size: int | None = None

    def __post_init__(self) -> None:
        if self.eps_placement not in ("variance", "deviation"):
            raise ValueError(
                f"eps_placement is {self.eps_placement!r}: expected 'variance' or 'deviation'"
            )
        if self.renorm is not None and self.running is None:
            raise ValueError("renorm corrects towards running moments, but there are none")

    @property
    def by_batch(self) -> bool:
        """Whether the batch's own moments normalize it."""
        return self.running is None or self.renorm is not None

    def inverse_std(self, var: Array) -> Array:
        """Return what x - mu is multiplied by."""
        if self.eps_placement == "variance":
            return np.asarray(1 / np.sqrt(var + self.eps))
        return np.asarray(1 / (np.sqrt(var) + self.eps))

    def slope(self, var: Array) -> Array:
        """Return -2 times the derivative of `inverse_std` by the variance."""
        inverse = self.inverse_std(var)
        if self.eps_placement == "variance":
            return inverse**3
        # A constant channel has no derivative; there x - mu is 0, and so is what it would multiply.
        return np.divide(inverse**2, np.sqrt(var), where=var > 0, out=np.zeros_like(var))


def forward(
    x: ArrayLike, gamma: ArrayLike | None = None, beta: ArrayLike | None = None, **options: Any
) -> Array:
    """Normalize a batch.

    Args:
        x: The batch, with its channels along `axis`.
        gamma: The scale of each channel, (C,); 1 if left out.
        beta: The shift of each channel, (C,); 0 if left out.
        options: See `Options`.
    """
    batch, o = _float64(x), Options(**options)
    function, _ = _activation(o)
    y = np.empty_like(batch)
    for at, part in _groups(batch, o):
        done = _normalize(batch[at], gamma, beta, part)
        y[at] = _shaped(function(done.z), batch[at], o.axis)
    return y


class Gradients(NamedTuple):
    """The derivatives of a loss by everything that went into `forward`.

    Attributes:
        x: By the batch, in its shape.
        gamma: By the scale, (C,).
        beta: By the shift, (C,).
        residual: By the residual, in the shape of the batch.
    """

    x: Array
    gamma: Array
    beta: Array
    residual: Array


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    **options: Any,
) -> Gradients:
    """Return the gradients of a loss, given `dy`, its gradient by what `forward` returned.

    With g = dy * activation'(z), which is dy itself without an activation:

        dbeta = sum g         dgamma = sum g * xhat         dresidual = g
        dx = gamma / sqrt(var + eps) * (g - w * (dbeta / m + xhat * dgamma / (m - correction)))

    where w is the weight of the position, 1 without weights. With `running` moments nothing flows
    back through them: dx = gamma / sqrt(var + eps) * g. With `renorm`, r and d are constants:

        dgamma = sum g * (r * xhat + d)
        dx = gamma * r / sqrt(var + eps)
             * (g - w * (dbeta / m + xhat * sum(g * xhat) / (m - correction)))

    In a ghost batch each group has an m, a dbeta and a dgamma of its own for its dx.
    """
    batch, upstream, o = _float64(x), _float64(dy), Options(**options)
    dx, dresidual = np.empty_like(batch), np.empty_like(batch)
    dgamma = dbeta = np.zeros(batch.shape[o.axis])
    for at, part in _groups(batch, o):
        of = _backward(upstream[at], batch[at], gamma, beta, part)
        dx[at], dresidual[at] = of.x, of.residual
        dgamma, dbeta = dgamma + of.gamma, dbeta + of.beta
    return Gradients(dx, dgamma, dbeta, dresidual)


def _backward(
    dy: Array, x: Array, gamma: ArrayLike | None, beta: ArrayLike | None, o: Options
) -> Gradients:
    """Return the gradients of one group."""
    done = _normalize(x, gamma, beta, o)
    _, derivative = _activation(o)
    g = _matrix(dy, o.axis) * derivative(done.z)
    dbeta, dgamma = g.sum(axis=0), (g * done.xhat).sum(axis=0)
    scale = done.gamma * done.r
    dx = scale * done.inverse_std * g
    if o.by_batch:  # the moments, too, depend on x
        count, var = done.moments.count, done.moments.var(o.correction)
        if count > 0:
            dx -= scale * done.inverse_std * done.weight * dbeta / count
        if count > o.correction:
            # With eps in the variance this is xhat * dgamma / (m - correction), scaled like g.
            sums = (g * done.distance).sum(axis=0) / (count - o.correction)
            back = scale * o.slope(var) * done.distance * sums
            dx -= np.where(done.weight == 0, 0, done.weight * back)
    dx = np.where(done.absent, 0, dx)
    return Gradients(_shaped(dx, x, o.axis), dgamma, dbeta, _shaped(g, x, o.axis))


def update(
    running: tuple[ArrayLike, ArrayLike],
    found: Moments,
    momentum: float = 0.1,
    convention: Literal["torch", "keras"] = "torch",
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
    if convention not in ("torch", "keras"):
        raise ValueError(f"convention is {convention!r}: expected 'torch' or 'keras'")
    mean, var = _float64(running[0]), _float64(running[1])
    if found.count <= 1 or not np.isfinite([found.mean, found.m2]).all():
        return mean, var
    new = momentum if convention == "torch" else 1 - momentum
    return (1 - new) * mean + new * found.mean, (1 - new) * var + new * found.var(correction=1)


class _Pass(NamedTuple):
    """What a forward pass computed; a matrix has a row a position, a column a channel."""

    z: Array  # what goes into the activation, a matrix
    xhat: Array  # the normalized batch, a matrix
    distance: Array  # x - mu, a matrix
    inverse_std: Array  # 1 / sqrt(var + eps), (C,)
    r: Array  # what xhat was multiplied by to correct it, (C,)
    gamma: Array  # (C,)
    weight: Array  # of each row, (rows, 1)
    absent: NDArray[np.bool_]  # of weight 0 and not finite, a matrix
    moments: Moments  # the batch's


def _normalize(x: Array, gamma: ArrayLike | None, beta: ArrayLike | None, o: Options) -> _Pass:
    rows, weight, absent = _rows(x, o.axis, o.weights)
    found = moments(x, o.axis, o.weights)
    mean, inverse_std = found.mean, np.zeros_like(found.mean)
    if o.by_batch and found.count > 0:
        inverse_std = o.inverse_std(found.var(o.correction))
    r, d = np.ones_like(mean), np.zeros_like(mean)
    if o.running is not None:
        running = _float64(o.running[0]), o.inverse_std(_float64(o.running[1]))
        if o.renorm is None:
            mean, inverse_std = running
        else:
            r, d = renorm(mean, inverse_std, running, o.renorm)
    xhat = r * ((rows - mean) * inverse_std) + d
    scale = np.ones_like(mean) if gamma is None else _float64(gamma)
    z = scale * xhat
    if beta is not None:
        z = z + _float64(beta)
    if o.residual is not None:
        z = z + _matrix(o.residual, o.axis)
    return _Pass(z, xhat, rows - mean, inverse_std, r, scale, weight, absent, found)


def _groups(x: Array, o: Options) -> Iterator[tuple[tuple[slice | EllipsisType, ...], Options]]:
    """Give where in the batch each group lies, and the options with its own share of the arrays."""
    if o.ghost_size is None or x.ndim == 1:
        yield (...,), o
        return
    axis = o.axis % x.ndim
    weights = None
    if o.weights is not None:
        weights = np.broadcast_to(_float64(o.weights), x.shape[:axis] + x.shape[axis + 1 :])
    start = 0
    for length in groups(x.shape, axis, o.ghost_size):
        examples = slice(start, start := start + length)
        at = (slice(None), examples) if axis == 0 else (examples,)
        part = o if weights is None else replace(o, weights=weights[examples])
        if o.residual is not None:
            part = replace(part, residual=_float64(o.residual)[at])
        yield at, part


def _float64(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def _matrix(x: ArrayLike, axis: int) -> Array:
    """Return `x` as a matrix: a row a position, a column a channel."""
    moved = np.moveaxis(_float64(x), axis, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])


def _shaped(matrix: Array, like: ArrayLike, axis: int) -> Array:
    """Undo `_matrix`: return the matrix in the shape of `like`."""
    moved = np.moveaxis(np.asarray(like), axis, -1).shape
    return np.moveaxis(matrix.reshape(moved), -1, axis)


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
    "relu6": (None, lambda z: np.clip(z, 0, 6), lambda z: ((z > 0) & (z < 6)) * 1.0),
    "hardswish": (
        None,
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0, np.where(z < 3, z / 3 + 0.5, 1)),
    ),
}


def _activation(o: Options) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return an activation and its derivative; without a name, the identity."""
    if o.activation is None:
        return (lambda z: z), np.ones_like
    default, function, derivative = ACTIVATIONS[o.activation]
    if default is None:
        return function, derivative
    parameter = default if o.parameter is None else o.parameter
    return (lambda z: function(z, parameter)), (lambda z: derivative(z, parameter))
