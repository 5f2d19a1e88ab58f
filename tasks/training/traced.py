"""TensorFlow graphs that are traced once."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def traced(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """Trace `function` once, for any number of rows.

    A plain `tf.function` is traced twice for its first calls, and again for the last,
    smaller batch; a trace takes as long as ten updates.

    Args:
        function: takes one tensor for each example.
        examples: tensors whose first axis counts rows, or of no axis.

    Returns:
        The same function as a graph.
    """
    specs = [
        tf.TensorSpec([None, *example.shape[1:]] if example.shape.rank else [], example.dtype)
        for example in examples
    ]
    graph: Callable[..., Any] = tf.function(function, autograph=False).get_concrete_function(*specs)
    return graph
