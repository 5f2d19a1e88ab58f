"""A Keras model as a TensorFlow graph with constant weights, for inference alone.

Such a graph can be run without TensorFlow, whose import alone takes longer than
reading and running the graph. The same weights give the same bytes.
"""

from typing import Any

INPUT = "photos"


def frozen_graph(model: Any) -> bytes:
    """Serialise what `model` computes when it does not train.

    What only training uses is left out: augmentation and dropout give back what they
    are given.

    Args:
        model: keras.Model, float32 (batch, size, size, 3) -> float32 (batch, ...).

    Returns:
        A `GraphDef`: uint8 (n, size, size, 3), RGB in [0, 255], called `INPUT`, ->
        what the model gives; float32 (n, ...).
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    function = tf.function(lambda photos: model(tf.cast(photos, tf.float32), training=False))
    given = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name=INPUT)
    frozen = convert_variables_to_constants_v2(function.get_concrete_function(given))
    graph = frozen.graph.as_graph_def()
    for node in graph.node:
        # For TensorFlow alone, and numbered by what the process had traced before.
        for name in [name for name in node.attr if name.startswith("_")]:
            del node.attr[name]
    content: bytes = graph.SerializeToString(deterministic=True)
    return content
