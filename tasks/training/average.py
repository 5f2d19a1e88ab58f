"""The mean of the weights that a phase passes through, which generalises better than their last.

Cha et al., SWAD: Domain Generalization by Seeking Flat Minima, 2021, without its search for
where to begin and end; after Izmailov et al., Averaging Weights Leads to Wider Optima and
Better Generalization, 2018. At a constant rate updates go around in a wide valley, and their
mean lies in the middle of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf


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
