"""MixStyle, random erasing, and stochastic weight averaging."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

MIXSTYLE_ALPHA = 0.1
"""Of the beta distribution of the mixing weights, as in the paper."""
LARGEST_PATCH = 3 / 7
"""Of a side of the feature map."""

_EPSILON = np.float32(1e-6)


def mixstyle(
    features: NDArray[np.float32], random: np.random.Generator, probability: float
) -> NDArray[np.float32]:
    """Mix each photo's channel statistics with those of another photo of the batch.

    Zhou et al., Domain Generalization with MixStyle, 2021.

    Args:
        features: float32, (batch, h, w, channels).
        probability: that this batch is mixed.
    """
    if random.random() >= probability:
        return features
    count = len(features)
    partners = random.permutation(count)
    weights = random.beta(MIXSTYLE_ALPHA, MIXSTYLE_ALPHA, (count, 1, 1, 1)).astype(np.float32)

    def mix(values: NDArray[np.float32]) -> NDArray[np.float32]:
        mixed: NDArray[np.float32] = weights * values + (1 - weights) * values[partners]
        return mixed

    mean = features.mean(axis=(1, 2), keepdims=True)
    deviation = features.std(axis=(1, 2), keepdims=True) + _EPSILON
    result: NDArray[np.float32] = (features - mean) / deviation * mix(deviation)
    result += mix(mean)
    return result


def random_erasing(
    features: NDArray[np.float32], random: np.random.Generator, probability: float
) -> NDArray[np.float32]:
    """Set a rectangle of some photos' feature maps to zero.

    Zhong et al., Random Erasing Data Augmentation, 2020, on feature maps. Maps of a single
    place stay as they are.

    Args:
        features: float32, (batch, h, w, channels).
        probability: that a photo loses a patch.
    """
    count, height, width, _ = features.shape
    if probability == 0 or min(height, width) < 2:
        return features
    erased = np.less(random.random(count), probability)
    rows, columns = (_spans(random, count, side) for side in (height, width))
    patch = erased[:, None, None] & rows[:, :, None] & columns[:, None, :]
    return np.where(patch[..., None], np.float32(0), features)


def _spans(random: np.random.Generator, count: int, side: int) -> NDArray[np.bool_]:
    """Draw one span of a side for each photo; bool, (count, side)."""
    length = random.integers(1, max(int(side * LARGEST_PATCH), 1) + 1, count)
    start = random.integers(0, side - length + 1)
    place = np.arange(side)
    inside: NDArray[np.bool_] = (place >= start[:, None]) & (place < (start + length)[:, None])
    return inside


class WeightAverage:
    """Mean of variables over the last updates; before these, their present values.

    Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018.

    Args:
        variables: tf.Variables.
        updates: in total.
        fraction: of them, the last ones, that are averaged; 0 keeps the final values.
    """

    def __init__(self, variables: Sequence[Any], updates: int, fraction: float) -> None:
        self._variables = list(variables) if fraction else []
        self._averages = [tf.Variable(value, trainable=False) for value in self._variables]
        self._updates = tf.Variable(0.0, trainable=False)
        self._before = updates - round(fraction * updates)

    def update(self) -> None:
        """Take in the present values; callable inside a tf.function."""
        if not self._variables:
            return
        share = 1.0 / tf.maximum(self._updates.assign_add(1.0) - self._before, 1.0)
        for average, variable in zip(self._averages, self._variables, strict=True):
            average.assign_add(share * (variable - average))

    def keep(self) -> None:
        """Set the variables to their average."""
        for average, variable in zip(self._averages, self._variables, strict=True):
            variable.assign(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the variables to their average temporarily, to validate it."""
        present = [tf.identity(variable) for variable in self._variables]
        self.keep()
        try:
            yield
        finally:
            for value, variable in zip(present, self._variables, strict=True):
                variable.assign(value)
