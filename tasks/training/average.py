"""A running average of the weights, which generalises better than their last value."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf


class Average:
    """Exponential moving average of variables.

    The decay rises from 0.1 to its full value, min(decay, (1 + n) / (10 + n)) after
    n updates, as in TensorFlow's ExponentialMovingAverage: with a constant decay a
    phase of thirty updates would keep 40 % of the weights it started from.

    Args:
        variables: Keras variables that an optimizer changes.
        decay: 0 turns the average off; the last value is then what is kept.
    """

    def __init__(self, variables: Sequence[Any], decay: float) -> None:
        self._variables = [variable.value for variable in variables] if decay else []
        self._averages = [tf.Variable(value, trainable=False) for value in self._variables]
        self._updates = tf.Variable(0.0, trainable=False)
        self._decay = decay

    def update(self) -> None:
        """Take the present values in; callable inside a tf.function."""
        if not self._decay:
            return
        count = self._updates.assign_add(1.0)
        share = 1.0 - tf.minimum(self._decay, (1.0 + count) / (10.0 + count))
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
