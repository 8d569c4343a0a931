"""Shifts: what may happen to inputs between training and use, in five severities.

They follow Hendrycks & Dietterich (2019, arXiv:1903.12261), who measured how networks bear them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_Inputs: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class _Setting:
    """What a shift may depend on beside the inputs.

    Attributes:
        amount: How strong it is.
        low: The lowest value of the training inputs.
        high: The highest.
        seed: What noise is drawn by.
    """

    amount: float
    low: float
    high: float
    seed: int

    @property
    def range(self) -> float:
        """The range of the values."""
        return self.high - self.low


@dataclass(frozen=True)
class Shift:
    """A shift, and what each severity means.

    Attributes:
        name: One of `SHIFTS`.
        meaning: What the amount `a` does to a value `x`.
        amounts: How strong it is, for each of `SEVERITIES`.
        none: The amount that would change nothing.
        change: Shifts inputs (N, C, H, W); the result may exceed the range.
        spatial: Whether it needs pictures, with more than one row and column.
    """

    name: str
    meaning: str
    amounts: tuple[float, ...]
    none: float
    change: Callable[[_Inputs, _Setting], _Inputs]
    spatial: bool = False


def _brighten(x: _Inputs, to: _Setting) -> _Inputs:
    return x + to.amount * to.range


def _flatten(x: _Inputs, to: _Setting) -> _Inputs:
    mean: _Inputs = x.mean(axis=(1, 2, 3), keepdims=True)
    return mean + to.amount * (x - mean)


def _noise(x: _Inputs, to: _Setting) -> _Inputs:
    drawn = np.random.default_rng(to.seed).standard_normal(x.shape, np.float32)
    return x + to.amount * to.range * drawn


def _blur(x: _Inputs, to: _Setting) -> _Inputs:
    from scipy.ndimage import gaussian_filter

    sigma = to.amount * x.shape[2]
    blurred: _Inputs = gaussian_filter(x, (0, 0, sigma, sigma), mode="nearest")
    return blurred


def _invert(x: _Inputs, to: _Setting) -> _Inputs:
    return (1 - to.amount) * x + to.amount * (to.low + to.high - x)


def _rotate(x: _Inputs, to: _Setting) -> _Inputs:
    from scipy.ndimage import rotate

    turned: _Inputs = rotate(x, to.amount, axes=(3, 2), reshape=False, order=1, mode="nearest")
    return turned


#: Every shift. A test holds the table of the documentation to it.
KINDS: tuple[Shift, ...] = (
    Shift(
        "brightness",
        "`x + a·(high - low)`",
        (0.1, 0.2, 0.3, 0.4, 0.5),
        0,
        _brighten,
    ),
    Shift(
        "contrast",
        "`m + a·(x - m)`, with the mean `m` of the example",
        (0.75, 0.5, 0.35, 0.2, 0.1),
        1,
        _flatten,
    ),
    Shift(
        "noise",
        "`x + a·(high - low)·n`, with a standard normal `n` for each value",
        (0.08, 0.12, 0.18, 0.26, 0.38),
        0,
        _noise,
    ),
    Shift(
        "blur",
        "the Gaussian mean around `x`, with the standard deviation `a·H` pixels",
        (0.05, 0.065, 0.08, 0.1, 0.12),
        0,
        _blur,
        spatial=True,
    ),
    Shift(
        "inversion",
        "`(1 - a)·x + a·(low + high - x)`",
        (0.2, 0.4, 0.6, 0.8, 1.0),
        0,
        _invert,
    ),
    Shift(
        "rotation",
        "the picture turned left by `a` degrees",
        (10, 20, 35, 60, 90),
        0,
        _rotate,
        spatial=True,
    ),
)
SHIFTS: tuple[str, ...] = tuple(kind.name for kind in KINDS)
SEVERITIES = (1, 2, 3, 4, 5)


def applies(name: str, shape: tuple[int, int, int]) -> bool:
    """Return whether a shift makes sense for examples of a shape.

    Blur and rotation need pictures; features, of the shape (F, 1, 1), have no neighbours.

    Args:
        name: One of `SHIFTS`.
        shape: The shape (C, H, W) of an example.

    Raises:
        ValueError: There is no such shift.

    Example:
        >>> [name for name in SHIFTS if applies(name, (4, 1, 1))]
        ['brightness', 'contrast', 'noise', 'inversion']
    """
    return not _kind(name).spatial or _is_picture(shape)


def shift(
    inputs: _Inputs, name: str, severity: int, *, low: float, high: float, seed: int = 0
) -> _Inputs:
    """Shift inputs.

    Pictures are clipped to [low, high], as a camera would; features are not, for nothing saturates.
    What blur and rotation need from outside of a picture is its nearest value.

    Args:
        inputs: Shape (N, C, H, W).
        name: One of `SHIFTS`.
        severity: One of `SEVERITIES`.
        low: The lowest value of the training inputs.
        high: The highest.
        seed: What noise is drawn by. The severities scale the same noise.

    Returns:
        New inputs of the same shape.

    Raises:
        ValueError: There is no such shift or severity, or the shift does not apply.

    Example:
        >>> x = np.array([[[[0, 0.25], [0.5, 1]]]], np.float32)
        >>> shift(x, "brightness", 5, low=0, high=1)
        array([[[[0.5 , 0.75],
                 [1.  , 1.  ]]]], dtype=float32)
    """
    kind = _kind(name)
    if severity not in SEVERITIES:
        raise ValueError(f"got the severity {severity!r}, expected one of {SEVERITIES}")
    if inputs.ndim != 4 or not applies(name, inputs.shape[1:]):
        needed = ", H and W above 1" * kind.spatial
        got = f"inputs of shape {inputs.shape}"
        raise ValueError(f"{name}: got {got}, expected (N, C, H, W){needed}")
    setting = _Setting(kind.amounts[SEVERITIES.index(severity)], float(low), float(high), seed)
    shifted = kind.change(inputs.astype(np.float32, copy=False), setting)
    return shifted.clip(setting.low, setting.high) if _is_picture(inputs.shape[1:]) else shifted


def _kind(name: str) -> Shift:
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"got the shift {name!r}, expected one of {', '.join(SHIFTS)}")


def _is_picture(shape: tuple[int, ...]) -> bool:
    _, height, width = shape
    return height > 1 and width > 1
