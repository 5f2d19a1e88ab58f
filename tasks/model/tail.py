"""The trainable top of the network as fused TensorFlow operations."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tasks.errors import ModelError
from tasks.model.network import HEAD
from tasks.model.weights import Weights
from tasks.params import LABELS

MIXED = "mixed_bfloat16"
FULL = "float32"

LAYERS = (
    "block7a_expand_conv",
    "block7a_expand_bn",
    "block7a_expand_activation",
    "block7a_dwconv",
    "block7a_bn",
    "block7a_activation",
    "block7a_se_squeeze",
    "block7a_se_reshape",
    "block7a_se_reduce",
    "block7a_se_expand",
    "block7a_se_excite",
    "block7a_project_conv",
    "block7a_project_bn",
    "top_conv",
    "top_bn",
    "top_activation",
)
"""Layers of EfficientNetB0 above the cut, bottom to top; `trainable_layers` counts them."""

BATCH_NORM_EPSILON = 1e-3
"""Keras's default, which EfficientNetB0 uses."""

MatMul = Callable[[Any, Any], Any]
"""Multiplies two float32 matrices."""


class Tail:
    """Block 7a, the top and the head, with variables of its own.

    Logits come before the head's softmax, so that loss and temperature stay exact for
    confident predictions.

    Args:
        weights: of the backbone or of a phase.
        trainable_layers: top layers of the backbone that train; BatchNorm never does.
        dropout: rate on the pooled features.
        seed: of a fresh head and of the dropout.

    Raises:
        ModelError: weights are missing.
    """

    def __init__(
        self, weights: Weights, trainable_layers: int = 0, dropout: float = 0.0, seed: int = 0
    ) -> None:
        self._dropout = dropout
        self._seed = seed
        opened = {*LAYERS[len(LAYERS) - trainable_layers :], HEAD}
        if f"{HEAD}/kernel" not in weights:
            weights = weights | _fresh_head(seed)
        self._variables: dict[str, tf.Variable] = {}
        for name, value in weights.items():
            layer = name.split("/")[0]
            if layer in LAYERS or layer == HEAD:
                trains = layer in opened and not layer.endswith("_bn")
                self._variables[name] = tf.Variable(value, trainable=trains)

    @property
    def trainable_variables(self) -> list[tf.Variable]:
        return [variable for variable in self._variables.values() if variable.trainable]

    def weights(self) -> Weights:
        """Copy all weights, by layer."""
        return {name: variable.numpy() for name, variable in self._variables.items()}

    def pooled(self, features: Any, matmul: MatMul = tf.matmul) -> Any:
        """Run block 7a and the top in inference mode.

        Args:
            features: float32, (batch, h, w, 192); output of the trunk.
            matmul: of the three large convolutions.

        Returns:
            float32, (batch, 1280).
        """
        x = _pointwise(features, *self._fused("block7a_expand_conv", "block7a_expand_bn"), matmul)
        x = _swish(x)
        kernel, bias = self._fused("block7a_dwconv", "block7a_bn")
        x = _swish(tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME") + bias)
        gate = tf.reduce_mean(x, [1, 2], keepdims=True)
        gate = _swish(_pointwise(gate, *self._convolution("block7a_se_reduce")))
        gate = tf.sigmoid(_pointwise(gate, *self._convolution("block7a_se_expand")))
        project = self._fused("block7a_project_conv", "block7a_project_bn")
        x = _pointwise(x * gate, *project, matmul)
        return _mean_swish(_pointwise(x, *self._fused("top_conv", "top_bn"), matmul))

    def logits(self, pooled: Any, update: Any = None) -> Any:
        """Run the head without its softmax.

        Args:
            pooled: float32, (batch, 1280).
            update: number of the update, which seeds the dropout; None for inference.

        Returns:
            float32, (batch, 6).
        """
        if update is not None and self._dropout:
            seed = tf.stack([tf.constant(self._seed, tf.int64), tf.cast(update, tf.int64)])
            pooled = tf.nn.experimental.stateless_dropout(pooled, self._dropout, seed)
        return tf.matmul(pooled, self._get(HEAD, "kernel")) + self._get(HEAD, "bias")

    def _get(self, layer: str, name: str) -> Any:
        try:
            return tf.convert_to_tensor(self._variables[f"{layer}/{name}"])
        except KeyError:
            raise ModelError(
                f"The weights '{layer}/{name}' are missing. "
                "Run the backbone and training stages again."
            ) from None

    def _convolution(self, layer: str) -> tuple[Any, Any]:
        return self._get(layer, "kernel"), self._get(layer, "bias")

    def _fused(self, convolution: str, norm: str) -> tuple[Any, Any]:
        """Kernel and bias of a convolution with its frozen BatchNorm folded in."""
        kernel = self._get(convolution, "kernel")
        variance = self._get(norm, "moving_variance") + BATCH_NORM_EPSILON
        scale = self._get(norm, "gamma") * tf.math.rsqrt(variance)
        by_channel = tf.reshape(scale, [-1, 1]) if kernel.shape[-1] == 1 else scale
        return kernel * by_channel, self._get(norm, "beta") - self._get(norm, "moving_mean") * scale


def usable_precision(wanted: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Fall back to float32 where TensorFlow would emulate bfloat16.

    That is without oneDNN, or without the processor's instructions for it. Emulated, the
    tail's products took 1.1 to 2.8 times as long as in float32.
    """
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0" or not cpuinfo.is_file():
        return FULL
    lines = cpuinfo.read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return wanted if "avx512_bf16" in flags or "amx_bf16" in flags else FULL


def matmul_in(precision: str) -> MatMul:
    """The matrix product of a training precision."""
    exact: MatMul = tf.matmul
    return _mixed_matmul if precision == MIXED else exact


def _fresh_head(seed: int) -> Weights:
    """The head that `tasks.model.network.build_model` starts from."""
    shape = (1280, len(LABELS))
    kernel = keras.initializers.GlorotUniform(seed=seed)(shape).numpy()
    return {f"{HEAD}/kernel": kernel, f"{HEAD}/bias": tf.zeros(shape[1]).numpy()}


def _pointwise(x: Any, kernel: Any, bias: Any, matmul: MatMul = tf.matmul) -> Any:
    """A 1 x 1 convolution as one matrix product."""
    matrix = tf.reshape(kernel, kernel.shape[2:])
    flat = matmul(tf.reshape(x, [-1, kernel.shape[2]]), matrix) + bias
    return tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [kernel.shape[3]]], 0))


def _mixed_matmul_with_gradient(left: Any, right: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Round both factors once for this product and for the two of its gradient."""
    low_left, low_right = (tf.cast(factor, tf.bfloat16) for factor in (left, right))

    def gradient(upstream: Any) -> tuple[Any, Any]:
        low = tf.cast(upstream, tf.bfloat16)
        return (
            tf.cast(tf.matmul(low, low_right, transpose_b=True), tf.float32),
            tf.cast(tf.matmul(low_left, low, transpose_a=True), tf.float32),
        )

    return tf.cast(tf.matmul(low_left, low_right), tf.float32), gradient


def _swish_with_gradient(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """As `tf.nn.silu`, which would compute the sigmoid again for the gradient."""
    sigmoid = tf.sigmoid(x)
    y = x * sigmoid
    return y, lambda upstream: upstream * (sigmoid + y * (1.0 - sigmoid))


def _mean_swish_with_gradient(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Swish and its mean over h and w, without an upstream gradient for each place."""
    y, gradient = _swish_with_gradient(x)
    share = 1.0 / (x.shape[1] * x.shape[2])
    return tf.reduce_mean(y, [1, 2]), lambda upstream: gradient(
        (share * upstream)[:, tf.newaxis, tf.newaxis]
    )


_mixed_matmul: MatMul = tf.custom_gradient(_mixed_matmul_with_gradient)
_swish: Callable[[Any], Any] = tf.custom_gradient(_swish_with_gradient)
_mean_swish: Callable[[Any], Any] = tf.custom_gradient(_mean_swish_with_gradient)
