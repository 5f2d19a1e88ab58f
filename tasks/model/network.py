"""The classifier as a Keras functional model, and its trainable tail as fused operations."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tasks.model.files import Weights, get_weights, read_weights, set_weights
from tasks.params import INPUT_SIZE, AugmentationParams

CUT = "block6d_add"  # the trunk's last layer; the layers above it and the head are the tail
BLOCK = "expand_conv expand_bn expand_activation dwconv bn activation se_squeeze se_reshape "
BLOCK += "se_reduce se_expand se_excite project_conv project_bn"
LAYERS = tuple(f"block7a_{name}" for name in BLOCK.split())
LAYERS += ("top_conv", "top_bn", "top_activation")
"""Layers of EfficientNetB0 above the cut, bottom to top; `trainable_layers` counts them."""
HEAD = "predictions"
BATCH_NORM_EPSILON = 1e-3  # Keras's default, which EfficientNetB0 uses
MIXED, FULL = "mixed_bfloat16", "float32"
MatMul = Callable[[Any, Any], Any]


def build_model(
    classes: int,
    augmentation: AugmentationParams | None = None,
    dropout: float = 0.0,
    *,
    size: int = INPUT_SIZE,
    backbone_weights: Path | None = None,
    seed: int = 0,
) -> Any:
    """Build the classifier, with random weights unless `backbone_weights` names a file.

    It maps float32 (n, size, size, 3) in [0, 255] to probabilities, float32 (n, classes).
    """
    backbone = build_backbone(size)
    photo = keras.Input((size, size, 3), name="photo")
    if backbone_weights is not None:
        set_weights(backbone.layers, read_weights(backbone_weights))
    x = photo if augmentation is None else _augmentation(augmentation, size, seed)(photo)
    x = backbone(x, training=False)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    if dropout:
        x = keras.layers.Dropout(dropout, seed=seed, name="dropout")(x)
    kernel = keras.initializers.GlorotUniform(seed=seed)
    head = keras.layers.Dense(classes, "softmax", kernel_initializer=kernel, name=HEAD)
    return keras.Model(photo, head(x), name="handsigns")


def build_backbone(size: int = INPUT_SIZE, include_top: bool = False) -> Any:
    """Build an untrained EfficientNetB0 without drop-connect, which Keras 3.15 runs under `fit`."""
    if not tf.distribute.has_strategy():
        # Else the numbers in names, and so files, depend on the models that were built before.
        keras.backend.clear_session(free_memory=False)
    backbone = keras.applications.EfficientNetB0(
        include_top=include_top, weights=None, input_shape=(size, size, 3)
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
            # Never drawn from again, but saved: a fixed value keeps files equal.
            layer.seed_generator.state.assign([0, 0])
    return backbone


def build_trunk(backbone_weights: Path, size: int = INPUT_SIZE) -> Any:
    """Build the part of the backbone that never trains, up to `CUT`; float32 (n, h, w, 192)."""
    backbone = build_backbone(size)
    set_weights(backbone.layers, read_weights(backbone_weights))
    return keras.Model(backbone.input, backbone.get_layer(CUT).output, name="trunk")


def backbone_of(model: Any) -> Any:
    return model.get_layer("efficientnetb0")


def freeze(model: Any, trainable_layers: int) -> None:
    """Unfreeze the top N layers of the backbone and the head, but no BatchNorm.

    Under `fit` Keras 3.15 passes `training=True` to nested models: its statistics would move.
    """
    layers = backbone_of(model).layers
    for index, layer in enumerate(layers):
        batch_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= len(layers) - trainable_layers and not batch_norm


def get_tail(model: Any) -> Weights:
    return get_weights([*map(backbone_of(model).get_layer, LAYERS), model.get_layer(HEAD)])


def set_tail(model: Any, weights: Weights) -> None:
    """Copy a phase's weights into the tail; the backbone's have no head, it stays."""
    head = [model.get_layer(HEAD)] if f"{HEAD}/kernel" in weights else []
    set_weights([*map(backbone_of(model).get_layer, LAYERS), *head], weights)


def _augmentation(params: AugmentationParams, size: int, seed: int) -> Any:
    """`params` as Keras's own layers, but for `zoom_out_prob`, for which there is none."""
    layers = keras.layers
    steps: list[Any] = [
        layers.RandomRotation(params.rotation / 360, fill_mode="reflect", seed=seed),
        layers.RandomZoom(params.zoom, fill_mode="reflect", seed=seed + 1),
        layers.RandomTranslation(params.shift, params.shift, fill_mode="reflect", seed=seed + 2),
    ]
    if params.horizontal_flip:
        steps.append(layers.RandomFlip("horizontal", seed=seed + 3))
    steps.append(layers.RandomBrightness(params.brightness, seed=seed + 4))
    steps.append(layers.RandomContrast(params.contrast, seed=seed + 5))
    picture = keras.Input((size, size, 3))
    channels = []
    for number in range(3):
        jitter = layers.RandomBrightness(params.color_jitter, seed=seed + 6 + number)
        channels.append(jitter(picture[..., number : number + 1]))
    steps.append(keras.Model(picture, layers.Concatenate()(channels), name="channels"))
    return keras.Sequential([keras.Input((size, size, 3)), *steps], name="augmentation")


class Tail:
    """Block 7a, the top and the head, of a phase's weights, or the backbone's and a fresh head."""

    def __init__(
        self,
        weights: Weights,
        classes: int,
        trainable_layers: int = 0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._dropout, self._seed = dropout, seed
        opened = {*LAYERS[len(LAYERS) - trainable_layers :], HEAD}
        if f"{HEAD}/kernel" not in weights:
            kernel = keras.initializers.GlorotUniform(seed=seed)((1280, classes))
            bias = tf.zeros(classes)
            weights = weights | {f"{HEAD}/kernel": kernel.numpy(), f"{HEAD}/bias": bias.numpy()}
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
        return {name: variable.numpy() for name, variable in self._variables.items()}

    def pooled(self, features: Any, matmul: MatMul = tf.matmul) -> Any:
        """Run block 7a and the top; float32 (n, h, w, 192) -> float32 (n, 1280)."""
        x = _pointwise(features, *self._fused("block7a_expand_conv", "block7a_expand_bn"), matmul)
        x = _swish(x)
        kernel, bias = self._fused("block7a_dwconv", "block7a_bn")
        x = _swish(tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME") + bias)
        gate = tf.reduce_mean(x, [1, 2], keepdims=True)
        reduce, expand = (
            (self._get(f"block7a_se_{name}", "kernel"), self._get(f"block7a_se_{name}", "bias"))
            for name in ("reduce", "expand")
        )
        gate = tf.sigmoid(_pointwise(_swish(_pointwise(gate, *reduce)), *expand))
        project = self._fused("block7a_project_conv", "block7a_project_bn")
        x = _pointwise(x * gate, *project, matmul)
        return _mean_swish(_pointwise(x, *self._fused("top_conv", "top_bn"), matmul))

    def logits(self, pooled: Any, update: Any = None) -> Any:
        """Run the head without its softmax; float32 (n, 1280) -> float32 (n, labels).

        `update` is the number of the update, which seeds the dropout; None for inference.
        """
        if update is not None and self._dropout:
            seed = tf.stack([tf.constant(self._seed, tf.int64), tf.cast(update, tf.int64)])
            pooled = tf.nn.experimental.stateless_dropout(pooled, self._dropout, seed)
        return tf.matmul(pooled, self._get(HEAD, "kernel")) + self._get(HEAD, "bias")

    def _get(self, layer: str, name: str) -> Any:
        return tf.convert_to_tensor(self._variables[f"{layer}/{name}"])

    def _fused(self, convolution: str, norm: str) -> tuple[Any, Any]:
        """Kernel and bias of a convolution with its frozen BatchNorm folded in."""
        kernel = self._get(convolution, "kernel")
        variance = self._get(norm, "moving_variance") + BATCH_NORM_EPSILON
        scale = self._get(norm, "gamma") * tf.math.rsqrt(variance)
        by_channel = tf.reshape(scale, [-1, 1]) if kernel.shape[-1] == 1 else scale
        return kernel * by_channel, self._get(norm, "beta") - self._get(norm, "moving_mean") * scale


def usable_precision(wanted: str) -> str:
    """Fall back to float32 where TensorFlow would emulate bfloat16, which takes longer."""
    cpuinfo, onednn = Path("/proc/cpuinfo"), os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
    flags = cpuinfo.read_text().split() if onednn and cpuinfo.is_file() else []
    return wanted if {"avx512_bf16", "amx_bf16"}.intersection(flags) else FULL


def _pointwise(x: Any, kernel: Any, bias: Any, matmul: MatMul = tf.matmul) -> Any:
    """A 1 x 1 convolution as one matrix product."""
    matrix = tf.reshape(kernel, kernel.shape[2:])
    flat = matmul(tf.reshape(x, [-1, kernel.shape[2]]), matrix) + bias
    return tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [kernel.shape[3]]], 0))


@tf.custom_gradient  # type: ignore[untyped-decorator]
def mixed_matmul(left: Any, right: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Multiply in bfloat16: round both factors once for this product and its two gradients."""
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


@tf.custom_gradient  # type: ignore[untyped-decorator]
def _mean_swish(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Swish and its mean over h and w, without an upstream gradient for each place."""
    y, gradient = _swish_with_gradient(x)
    share = 1.0 / (x.shape[1] * x.shape[2])
    return tf.reduce_mean(y, [1, 2]), lambda upstream: gradient(
        (share * upstream)[:, tf.newaxis, tf.newaxis]
    )


_swish: Callable[[Any], Any] = tf.custom_gradient(_swish_with_gradient)
