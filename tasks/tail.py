"""The part of the model above the cut, fed with stored features."""

from typing import Any

import keras
import tensorflow as tf

from tasks.model import CUT, HEAD, TAIL_LAYERS, backbone_of
from tasks.weights import Weights, put, take


class Tail:
    """Block 7a, the top and the head of a model of `build_model`; shares its layers.

    What is trained here is trained in the model. Logits are taken before the
    head's softmax, so that loss and temperature stay exact for sure predictions.

    Args:
        model: the whole functional model.
        dropout: share of pooled features dropped while training.
        seed: of the dropout.
    """

    def __init__(self, model: Any, dropout: float = 0.0, seed: int = 0) -> None:
        backbone = backbone_of(model)
        pooled = keras.layers.GlobalAveragePooling2D()(backbone.output)
        self._pool = keras.Model(backbone.get_layer(CUT).output, pooled)
        self._head = model.get_layer(HEAD)
        self._dropout = dropout
        self._seed = seed

    @property
    def variables(self) -> list[Any]:
        """The trainable variables, as `tasks.model.freeze` left them."""
        return [*self._pool.trainable_variables, *self._head.trainable_variables]

    def pooled(self, features: Any) -> Any:
        """Run block 7a and the top in inference mode.

        Args:
            features: float32, (batch, 7, 7, 192); output of `CUT`.

        Returns:
            float32, (batch, 1280).
        """
        return self._pool(features, training=False)

    def logits(self, pooled: Any, update: Any = None) -> Any:
        """Run the head without its softmax.

        Args:
            pooled: float32, (batch, 1280).
            update: number of the update while training, which draws the
                dropout; None for inference.

        Returns:
            float32, (batch, 6); unnormalised log-probabilities.
        """
        if update is not None and self._dropout:
            seed = tf.stack([tf.constant(self._seed, tf.int64), tf.cast(update, tf.int64)])
            pooled = tf.nn.experimental.stateless_dropout(pooled, self._dropout, seed)
        return tf.matmul(pooled, self._head.kernel) + self._head.bias


def tail_layers(model: Any, with_head: bool = True) -> list[Any]:
    """The layers whose weights a phase keeps, bottom to top."""
    backbone = backbone_of(model)
    layers = [backbone.get_layer(name) for name in TAIL_LAYERS]
    return [*layers, model.get_layer(HEAD)] if with_head else layers


def tail_weights(model: Any) -> Weights:
    """Copy the tail's and the head's weights out of `model`."""
    return take(tail_layers(model))


def put_tail(model: Any, weights: Weights) -> None:
    """Copy a phase's weights, or the backbone's, into `model`.

    The backbone's bring no head; the model's own fresh one then stays.

    Raises:
        ModelError: the weights do not fit.
    """
    put(tail_layers(model, with_head=f"{HEAD}/kernel" in weights), weights)
