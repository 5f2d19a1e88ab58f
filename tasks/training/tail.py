"""The part of the model above the cut, fed with stored features.

Block 7a and the top are written out here, on the model's own variables: each convolution
takes its frozen batch norm in, one of a single place is a matrix product, and swish keeps
its sigmoid for the gradient. An update so takes a sixth less time than through the layers,
and two fifths less where the large products are of bfloat16 numbers (`tasks.training.precision`).
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tasks.network.model import HEAD, TAIL_LAYERS, backbone_of
from tasks.network.weights import Weights, put, take
from tasks.training.precision import Product


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
        self._layers = {name: backbone.get_layer(name) for name in TAIL_LAYERS}
        self._head = model.get_layer(HEAD)
        self._dropout = dropout
        self._seed = seed

    @property
    def variables(self) -> list[Any]:
        """The trainable variables, as `tasks.network.model.freeze` left them."""
        layers = [*self._layers.values(), self._head]
        return [variable for layer in layers for variable in layer.trainable_variables]

    def pooled(self, features: Any, product: Product = tf.matmul) -> Any:
        """Run block 7a and the top in inference mode.

        Args:
            features: float32, (batch, 7, 7, 192); output of `CUT`.
            product: multiplies the matrices of the three large convolutions.

        Returns:
            float32, (batch, 1280).
        """
        expand = self._folded("block7a_expand_conv", "block7a_expand_bn")
        x = _swish(_places(features, *expand, product))
        kernel, bias = self._folded("block7a_dwconv", "block7a_bn")
        x = _swish(tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME") + bias)
        share = tf.reduce_mean(x, [1, 2], keepdims=True)
        share = _swish(_places(share, *self._own("block7a_se_reduce")))
        share = tf.sigmoid(_places(share, *self._own("block7a_se_expand")))
        project = self._folded("block7a_project_conv", "block7a_project_bn")
        x = _places(x * share, *project, product)
        return _mean_of_swish(_places(x, *self._folded("top_conv", "top_bn"), product))

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

    def _own(self, convolution: str) -> tuple[Any, Any]:
        layer = self._layers[convolution]
        return tf.convert_to_tensor(layer.kernel), layer.bias

    def _folded(self, convolution: str, norm: str) -> tuple[Any, Any]:
        """A convolution's kernel and bias with the batch norm behind it."""
        kernel = tf.convert_to_tensor(self._layers[convolution].kernel)
        layer = self._layers[norm]
        scale = layer.gamma * tf.math.rsqrt(layer.moving_variance + layer.epsilon)
        by_channel = tf.reshape(scale, [-1, 1]) if kernel.shape[-1] == 1 else scale
        return kernel * by_channel, layer.beta - layer.moving_mean * scale


def _places(x: Any, kernel: Any, bias: Any, product: Product = tf.matmul) -> Any:
    """Convolve with a kernel of one place: the same product everywhere."""
    matrix = tf.reshape(kernel, kernel.shape[2:])
    flat = product(tf.reshape(x, [-1, kernel.shape[2]]), matrix) + bias
    return tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [kernel.shape[3]]], 0))


def _swish_and_gradient(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What `tf.nn.silu` gives; it computes the sigmoid once more for the gradient."""
    sigmoid = tf.sigmoid(x)
    y = x * sigmoid
    return y, lambda upstream: upstream * (sigmoid + y * (1.0 - sigmoid))


def _mean_of_swish_and_gradient(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Swish and its mean over places, whose gradient is never written out for each place."""
    y, gradient = _swish_and_gradient(x)
    share = 1.0 / (x.shape[1] * x.shape[2])
    return tf.reduce_mean(y, [1, 2]), lambda upstream: gradient(
        (share * upstream)[:, tf.newaxis, tf.newaxis]
    )


_swish: Callable[[Any], Any] = tf.custom_gradient(_swish_and_gradient)
_mean_of_swish: Callable[[Any], Any] = tf.custom_gradient(_mean_of_swish_and_gradient)


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
