"""MixStyle, random erasing, weight averaging."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SHARES = 0.1
"""Both parameters of the beta distribution that the share a photo keeps of its own
style is drawn from; at 0.1, the paper's, it mostly keeps nearly all or nearly nothing."""

_SMALL = np.float32(1e-6)


def mix_styles(
    features: NDArray[np.float32], random: np.random.Generator, probability: float
) -> NDArray[np.float32]:
    """Mix each photo's style with that of another photo of the batch.

    Args:
        features: float32, (batch, h, w, channels).
        random: draws whether, with whom and how much.
        probability: that this batch is mixed at all.

    Returns:
        float32, of the same shape; `features` itself where nothing is mixed.
    """
    if random.random() >= probability:
        return features
    count = len(features)
    partners = random.permutation(count)
    kept = random.beta(SHARES, SHARES, (count, 1, 1, 1)).astype(np.float32)
    mean = features.mean(axis=(1, 2), keepdims=True)
    deviation = features.std(axis=(1, 2), keepdims=True) + _SMALL
    plain = (features - mean) / deviation
    mixed: NDArray[np.float32] = plain * _mix(deviation, partners, kept)
    mixed += _mix(mean, partners, kept)
    return mixed


def _mix(
    values: NDArray[np.float32], partners: NDArray[np.int64], kept: NDArray[np.float32]
) -> NDArray[np.float32]:
    mixed: NDArray[np.float32] = kept * values + (1 - kept) * values[partners]
    return mixed


LARGEST = 3 / 7
"""Of a side of the map; three of the seven places of a photo."""


def erase_patches(
    features: NDArray[np.float32], random: np.random.Generator, probability: float
) -> NDArray[np.float32]:
    """Set one rectangle of some photos' feature maps to zero.

    Args:
        features: float32, (batch, h, w, channels).
        random: draws whose map, where and how large.
        probability: that a photo loses a patch.

    Returns:
        float32, of the same shape; `features` itself where nothing is erased, and where
        the map is too small to lose a patch and keep the rest.
    """
    count, height, width, _ = features.shape
    if probability == 0 or min(height, width) < 2:
        return features
    erased = np.less(random.random(count), probability)
    rows, columns = (_span(random, count, side) for side in (height, width))
    patch = erased[:, None, None] & rows[:, :, None] & columns[:, None, :]
    return np.where(patch[..., None], np.float32(0), features)


def _span(random: np.random.Generator, count: int, side: int) -> NDArray[np.bool_]:
    """Draw places in a row for each photo: bool, (count, side)."""
    length = random.integers(1, max(int(side * LARGEST), 1) + 1, count)
    start = random.integers(0, side - length + 1)
    place = np.arange(side)
    inside: NDArray[np.bool_] = (place >= start[:, None]) & (place < (start + length)[:, None])
    return inside


class Average:
    """Even mean of variables over the last updates; until these come, their present values.

    Args:
        variables: Keras variables that an optimizer changes.
        updates: that there will be.
        share: of them, the last ones, that are averaged; 0 keeps the very last values.
    """

    def __init__(self, variables: Sequence[Any], updates: int, share: float) -> None:
        self._variables = [variable.value for variable in variables] if share else []
        self._averages = [tf.Variable(value, trainable=False) for value in self._variables]
        self._updates = tf.Variable(0.0, trainable=False)
        self._before = updates - round(share * updates)

    def update(self) -> None:
        """Take the present values in; callable inside a tf.function."""
        if not self._variables:
            return
        share = 1.0 / tf.maximum(self._updates.assign_add(1.0) - self._before, 1.0)
        for average, variable in zip(self._averages, self._variables, strict=True):
            average.assign_add(share * (variable - average))

    def keep(self) -> None:
        """Set the variables to their average for good."""
        for average, variable in zip(self._averages, self._variables, strict=True):
            variable.assign(average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Set the variables to their average for a while, say to score them."""
        present = [tf.identity(variable) for variable in self._variables]
        self.keep()
        try:
            yield
        finally:
            for value, variable in zip(present, self._variables, strict=True):
                variable.assign(value)
