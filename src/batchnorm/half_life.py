"""Momentum as a half-life: the number of batches after which half of the statistics are new."""

from __future__ import annotations

import math


def momentum_from_half_life(batches: float) -> float:
    """Return the momentum with which a batch's share in the running statistics halves in time.

        (1 - momentum)^batches = 1/2,     so     momentum = 1 - 2^(-1 / batches)

    Args:
        batches: The half-life h, in batches: what was in the running statistics h batches ago
            counts half. 0 keeps the last batch alone, infinity changes nothing.

    Returns:
        The momentum of PyTorch, the share of the new batch, between 0 and 1.

    Raises:
        ValueError: `batches` is no number, or negative.

    Example:
        >>> momentum_from_half_life(1)
        0.5
        >>> round(momentum_from_half_life(6.5788), 6)
        0.1
    """
    if _is_no_number(batches) or not batches >= 0:
        raise ValueError(
            f"half-life is {batches!r}: expected a number of batches, 0 or more; about 6.6 are "
            "what momentum=0.1 is"
        )
    return -math.expm1(-math.log(2) / batches) if batches else 1.0


def half_life_of(momentum: float) -> float:
    """Return the number of batches after which half of the running statistics are new.

        (1 - momentum)^h = 1/2,     so     h = -log(2) / log(1 - momentum)

    Args:
        momentum: That of PyTorch, the share of the new batch, between 0 and 1.

    Returns:
        The half-life h, in batches: 0 where momentum is 1, infinity where it is 0.

    Raises:
        ValueError: `momentum` is no number between 0 and 1.

    Example:
        >>> half_life_of(0.5)
        1.0
        >>> round(half_life_of(0.1), 4), round(half_life_of(0.01), 2)
        (6.5788, 68.97)
    """
    if _is_no_number(momentum) or not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum is {momentum!r}: expected a number between 0 and 1, the share of the new "
            "batch; None, the average over all batches, has no half-life"
        )
    if momentum in (0, 1):
        return 0.0 if momentum else math.inf
    return -math.log(2) / math.log1p(-momentum)


def _is_no_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)
