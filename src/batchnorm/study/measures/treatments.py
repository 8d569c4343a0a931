"""What is done to the inputs of a data set before a network, or a linear model, gets them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchnorm.study.data import DataSet


def badly_scaled(data_set: DataSet) -> DataSet:
    """Give each value of an example a scale of its own, from 0.1 to 1000, and move it.

    Args:
        data_set: Any.

    Returns:
        The same examples as features (F, 1, 1); those that are constant stay so.
    """
    count = math.prod(data_set.shape)
    draw = np.random.default_rng(0)
    scales = 10 ** draw.uniform(-1, 3, count)
    moved = scales * draw.uniform(-3, 3, count)

    def scaled(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        features = inputs.reshape(len(inputs), count) * scales + moved
        return features.astype(np.float32)[:, :, None, None]

    return replace(
        data_set,
        train_inputs=scaled(data_set.train_inputs),
        test_inputs=scaled(data_set.test_inputs),
    )


def standardized(data_set: DataSet) -> DataSet:
    """Scale the features badly, then give each the mean 0 and the variance 1 on training examples.

    Args:
        data_set: Any.

    Returns:
        The same examples as features (F, 1, 1); those that are constant in training are 0.
    """
    data_set = badly_scaled(data_set)
    mean, std = mean_and_std(data_set.train_inputs)
    train_inputs, test_inputs = (
        ((inputs - mean) / std).astype(np.float32)
        for inputs in (data_set.train_inputs, data_set.test_inputs)
    )
    return replace(data_set, train_inputs=train_inputs, test_inputs=test_inputs)


def mean_and_std(inputs: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what each feature is standardized by.

    Args:
        inputs: Shape (N, ...).

    Returns:
        The mean and the standard deviation, each of shape (...). The standard deviation of a
        feature that is constant is infinite, so that it becomes 0.

    Example:
        >>> mean_and_std(np.array([[1, 3], [1, 5]], np.float32))
        (array([1., 4.]), array([inf,  1.]))
    """
    mean, std = inputs.mean(0, np.float64), inputs.std(0, np.float64)
    std[inputs.min(0) == inputs.max(0)] = np.inf
    return mean, std
