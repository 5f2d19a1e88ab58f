"""The Keras functional model."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import keras
import tensorflow as tf

from tasks.errors import ModelError
from tasks.model.augment import INPUT_SIZE
from tasks.model.weights import put, read_weights
from tasks.params import LABELS, AugmentationParams


def augmentation_layers(params: AugmentationParams, size: int, seed: int) -> Any:
    """Build the variations of `params` as one layer, which acts only while training.

    Stock Keras layers only, so that the saved model opens without this package. One gain
    for each colour channel has no stock layer; each channel is brightened by its own amount
    instead. Nor have another backdrop and hands from far away, which are left out; what lies
    beyond the border is reflected, as these layers do by themselves.

    Args:
        params: strength of each variation.
        size: side of the photos in pixels.
        seed: of the first random layer; the others count on from it.

    Returns:
        keras.Sequential, float32 (batch, size, size, 3) in [0, 255] -> the same shape.
    """
    layers = keras.layers
    shapes: list[Any] = [
        layers.RandomRotation(params.rotation / 360, fill_mode="reflect", seed=seed),
        layers.RandomZoom(params.zoom, fill_mode="reflect", seed=seed + 1),
        layers.RandomTranslation(params.shift, params.shift, fill_mode="reflect", seed=seed + 2),
    ]
    if params.horizontal_flip:
        shapes.append(layers.RandomFlip("horizontal", seed=seed + 3))
    light = [
        layers.RandomBrightness(params.brightness, seed=seed + 4),
        layers.RandomContrast(params.contrast, seed=seed + 5),
        _channels(params.color_jitter, size, seed + 6),
    ]
    return keras.Sequential([keras.Input((size, size, 3)), *shapes, *light], name="augmentation")


def _channels(share: float, size: int, seed: int) -> Any:
    picture = keras.Input((size, size, 3))
    changed = [
        keras.layers.RandomBrightness(share, seed=seed + channel)(
            picture[..., channel : channel + 1]
        )
        for channel in range(3)
    ]
    return keras.Model(picture, keras.layers.Concatenate()(changed), name="channels")


CUT = "block6d_add"
FEATURE_SHAPE = (7, 7, 192)
STRIDE = 32
"""Pixels of the input to one place of the features."""
HEAD = "predictions"
TAIL_LAYERS = (
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
"""Layers of EfficientNetB0 above the cut, bottom to top."""

_Built = TypeVar("_Built")


def build_model(
    augmentation: AugmentationParams | None = None,
    dropout: float = 0.0,
    *,
    size: int = INPUT_SIZE,
    backbone_weights: Path | None = None,
    seed: int = 0,
) -> Any:
    """Build the classifier as one Keras functional model.

    Args:
        augmentation: strength of the augmentation layers; None for none.
        dropout: share of pooled features dropped while training.
        size: side of the input in pixels.
        backbone_weights: `backbone.safetensors`; None leaves random weights.
        seed: of the augmentation and dropout layers and the head.

    Returns:
        keras.Model, float32 (batch, size, size, 3) in [0, 255] ->
        float32 (batch, 6); probabilities, column i is `LABELS[i]`.

    Raises:
        ModelError: the weights do not fit.
    """
    return with_fresh_names(
        lambda: _build(augmentation, dropout, size, backbone_weights, seed),
    )


def build_backbone(size: int = INPUT_SIZE, include_top: bool = False) -> Any:
    """Build an untrained EfficientNetB0 whose layers are always named alike.

    Drop-connect is off: it lies below the cut, in the part that never trains,
    and Keras 3.15 would run it there under `fit` whatever `training` says.
    """
    return with_fresh_names(lambda: _build_backbone(size, include_top))


def build_tail(size: int = INPUT_SIZE, seed: int = 0) -> Any:
    """Build what phases train: the classifier of `build_model` without its trunk.

    Layers, names and initial head are the same, so weights move freely between both,
    and what works on the one works on the other: where the model has `CUT`, this has
    its input. It is built in a tenth of the time.

    Args:
        size: side of the model's input in pixels.
        seed: of the head.

    Returns:
        keras.Model, float32 (batch, size / 32, size / 32, 192), the output of `CUT` ->
        float32 (batch, 6); probabilities.
    """
    return with_fresh_names(lambda: _build_tail(size, seed))


def build_trunk(backbone_weights: Path | None = None, size: int = INPUT_SIZE) -> Any:
    """Build the frozen part of the backbone.

    Args:
        backbone_weights: `backbone.safetensors`; None leaves random weights.
        size: side of the input in pixels.

    Returns:
        keras.Model, float32 (batch, size, size, 3) in [0, 255] ->
        float32 (batch, size / 32, size / 32, 192), the output of `CUT`.
    """
    backbone = build_backbone(size)
    if backbone_weights is not None:
        put(backbone.layers, read_weights(backbone_weights))
    return trunk_of(backbone)


def trunk_of(backbone: Any) -> Any:
    """Return the part of `backbone` up to the cut; it shares the layers."""
    return keras.Model(backbone.input, backbone.get_layer(CUT).output, name="trunk")


def backbone_of(model: Any) -> Any:
    """Return the EfficientNetB0 inside a model of `build_model`."""
    return model.get_layer("efficientnetb0")


def freeze(model: Any, trainable_layers: int) -> None:
    """Open the top `trainable_layers` of the backbone, and the head, for training.

    Batch norm layers stay closed as layers. `training=False` alone does not
    hold them: under `fit` Keras 3.15 passes `training=True` down to nested
    models, and their statistics would move.
    """
    backbone = backbone_of(model)
    first = len(backbone.layers) - trainable_layers
    for index, layer in enumerate(backbone.layers):
        statistics = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= first and not statistics


def load_model(path: Path, size: int = INPUT_SIZE) -> Any:
    """Build our own architecture and load a file's weights into it.

    Nothing that the file says about layers or code is used, so a file cannot
    bring a layer of its own.

    Args:
        path: a `.keras` file written by the assemble stage.
        size: side of the input in pixels.

    Returns:
        keras.Model as of `build_model`, for inference.

    Raises:
        ModelError: the file is missing or does not fit the architecture.
    """
    model = build_model(size=size)
    try:
        with warnings.catch_warnings(action="ignore"):  # one for each layer, before the error
            model.load_weights(path)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"Model file does not hold this architecture's weights ({reason}). "
            f"Received: '{path}'. Name a .keras file that the assemble stage wrote."
        ) from error
    return model


def _build(
    augmentation: AugmentationParams | None,
    dropout: float,
    size: int,
    backbone_weights: Path | None,
    seed: int,
) -> Any:
    photo = keras.Input((size, size, 3), name="photo")
    backbone = _build_backbone(size, include_top=False)
    if backbone_weights is not None:
        put(backbone.layers, read_weights(backbone_weights))
    inside = photo if augmentation is None else augmentation_layers(augmentation, size, seed)(photo)
    top = backbone(inside, training=False)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(top)
    if dropout:
        pooled = keras.layers.Dropout(dropout, seed=seed, name="dropout")(pooled)
    return keras.Model(photo, _head(seed)(pooled), name="handsigns")


def _head(seed: int) -> Any:
    return keras.layers.Dense(
        len(LABELS),
        activation="softmax",
        kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
        name=HEAD,
    )


def _build_tail(size: int, seed: int) -> Any:
    shape = (size // STRIDE, size // STRIDE, FEATURE_SHAPE[-1])
    features = keras.Input(shape, name="features")
    top = _top(keras.Input(shape, name=CUT))
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(top(features, training=False))
    return keras.Model(features, _head(seed)(pooled), name="handsigns")


def _top(cut: Any) -> Any:
    """Block 7a and the top as `keras.applications` builds them, weights aside."""
    layers = keras.layers
    convolution = partial(layers.Conv2D, kernel_size=1, kernel_initializer="zeros")
    plain = partial(convolution, use_bias=False)
    x = plain(1152, name="block7a_expand_conv")(cut)
    x = layers.BatchNormalization(name="block7a_expand_bn")(x)
    x = layers.Activation("swish", name="block7a_expand_activation")(x)
    x = layers.DepthwiseConv2D(
        3, padding="same", use_bias=False, depthwise_initializer="zeros", name="block7a_dwconv"
    )(x)
    x = layers.BatchNormalization(name="block7a_bn")(x)
    x = layers.Activation("swish", name="block7a_activation")(x)
    share = layers.GlobalAveragePooling2D(name="block7a_se_squeeze")(x)
    share = layers.Reshape((1, 1, 1152), name="block7a_se_reshape")(share)
    share = convolution(48, activation="swish", name="block7a_se_reduce")(share)
    share = convolution(1152, activation="sigmoid", name="block7a_se_expand")(share)
    x = layers.Multiply(name="block7a_se_excite")([x, share])
    x = plain(320, name="block7a_project_conv")(x)
    x = layers.BatchNormalization(name="block7a_project_bn")(x)
    x = plain(1280, name="top_conv")(x)
    x = layers.BatchNormalization(name="top_bn")(x)
    x = layers.Activation("swish", name="top_activation")(x)
    return keras.Model(cut, x, name="efficientnetb0")


def _build_backbone(size: int, include_top: bool) -> Any:
    backbone = keras.applications.EfficientNetB0(
        include_top=include_top, weights=None, input_shape=(size, size, 3)
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
            # Never drawn from again, but saved: a fixed value keeps files equal.
            layer.seed_generator.state.assign([0, 0])
    return backbone


def with_fresh_names(build: Callable[[], _Built]) -> _Built:
    """Run `build` where automatic layer names start from the beginning.

    Keras counts them for each thread. Without this, names in a saved file would
    depend on what else the process had built before. A distribution strategy, which
    holds for a thread too, is carried over.
    """
    strategy = tf.distribute.get_strategy()

    def scoped() -> _Built:
        with strategy.scope():
            return build()

    with ThreadPoolExecutor(max_workers=1) as fresh:
        return fresh.submit(scoped).result()
