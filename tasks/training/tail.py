"""The trainable top of the network, fused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tasks.model.network import HEAD, TAIL_LAYERS, backbone_of
from tasks.model.weights import Weights, put, take

MIXED = "mixed_bfloat16"
FULL = "float32"

Product = Callable[[Any, Any], Any]
"""Multiplies two float32 matrices."""

_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def usable_precision(wanted: str, processors: Path = Path("/proc/cpuinfo")) -> str:
    """Say which precision this machine trains in.

    Where the processor has no instructions for bfloat16, or oneDNN, which uses them,
    is off, TensorFlow emulates them. The tail's products then took 1.1 times (oneDNN
    off) to 2.8 times (AVX-512 alone) as long as those of float32.

    Args:
        wanted: `training.precision` of params.yaml.
        processors: what Linux says of the processors; missing on other systems.

    Returns:
        `wanted`, or `FULL` in place of an emulated `MIXED`.
    """
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0" or not processors.is_file():
        return FULL
    lines = processors.read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return FULL if _INSTRUCTIONS.isdisjoint(flags.split()) else wanted


def product_in(precision: str) -> Product:
    """Choose how the large matrices are multiplied while the tail learns."""
    exact: Product = tf.matmul
    return _mixed_product if precision == MIXED else exact


def _product_and_gradient(left: Any, right: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """Both factors are rounded once for this product and the two of its gradient."""
    rounded_left, rounded_right = (tf.cast(factor, tf.bfloat16) for factor in (left, right))

    def gradient(upstream: Any) -> tuple[Any, Any]:
        rounded = tf.cast(upstream, tf.bfloat16)
        return (
            _full(tf.matmul(rounded, rounded_right, transpose_b=True)),
            _full(tf.matmul(rounded_left, rounded, transpose_a=True)),
        )

    return _full(tf.matmul(rounded_left, rounded_right)), gradient


_mixed_product: Product = tf.custom_gradient(_product_and_gradient)


def _full(values: Any) -> Any:
    return tf.cast(values, tf.float32)


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
        """The trainable variables, as `tasks.model.network.freeze` left them."""
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
