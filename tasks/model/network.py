"""The classifier as a Keras functional model."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import keras
import tensorflow as tf

from tasks.model.augment import INPUT_SIZE
from tasks.model.weights import Weights, get_weights, read_weights, set_weights
from tasks.params import LABELS, AugmentationParams

CUT = "block6d_add"
"""The trunk's last layer; the layers above it and the head are the tail."""
HEAD = "predictions"

Built = TypeVar("Built")


def build_model(
    augmentation: AugmentationParams | None = None,
    dropout: float = 0.0,
    *,
    size: int = INPUT_SIZE,
    backbone_weights: Path | None = None,
    seed: int = 0,
) -> Any:
    """Build the classifier.

    Args:
        augmentation: of the augmentation layers; None for no such layers.
        size: side of the input in pixels.
        backbone_weights: `backbone.safetensors`; None leaves random weights.
        seed: of augmentation, dropout and head.

    Returns:
        keras.Model, float32 (batch, size, size, 3) in [0, 255] -> float32 (batch, 6);
        probabilities, column i is `LABELS[i]`.
    """

    def build() -> Any:
        photo = keras.Input((size, size, 3), name="photo")
        backbone = _efficientnet(size)
        if backbone_weights is not None:
            set_weights(backbone.layers, read_weights(backbone_weights))
        x = photo if augmentation is None else _augmentation(augmentation, size, seed)(photo)
        x = backbone(x, training=False)
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, seed=seed, name="dropout")(x)
        head = keras.layers.Dense(
            len(LABELS),
            activation="softmax",
            kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
            name=HEAD,
        )
        return keras.Model(photo, head(x), name="handsigns")

    return _with_fresh_names(build)


def build_backbone(size: int = INPUT_SIZE, include_top: bool = False) -> Any:
    """Build an untrained EfficientNetB0."""
    return _with_fresh_names(lambda: _efficientnet(size, include_top))


def build_trunk(backbone_weights: Path | None = None, size: int = INPUT_SIZE) -> Any:
    """Build the part of the backbone that never trains.

    Returns:
        keras.Model, float32 (batch, size, size, 3) in [0, 255] -> float32 (batch,
        size / 32, size / 32, 192), the output of `CUT`.
    """
    backbone = build_backbone(size)
    if backbone_weights is not None:
        set_weights(backbone.layers, read_weights(backbone_weights))
    return keras.Model(backbone.input, backbone.get_layer(CUT).output, name="trunk")


def backbone_of(model: Any) -> Any:
    """The EfficientNetB0 inside a model of `build_model`."""
    return model.get_layer("efficientnetb0")


def freeze(model: Any, trainable_layers: int) -> None:
    """Unfreeze the top N layers of the backbone and the head; BatchNorm stays frozen.

    BatchNorm is frozen as layers: under `fit` Keras 3.15 passes `training=True` to nested
    models even where they were called with False, and their statistics would move.
    """
    layers = backbone_of(model).layers
    for index, layer in enumerate(layers):
        batch_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= len(layers) - trainable_layers and not batch_norm


def get_tail(model: Any) -> Weights:
    """Copy the weights of the tail."""
    return get_weights([*_layers_above_cut(model), model.get_layer(HEAD)])


def set_tail(model: Any, weights: Weights) -> None:
    """Copy a phase's weights into the tail; the backbone's have no head, it stays."""
    head = [model.get_layer(HEAD)] if f"{HEAD}/kernel" in weights else []
    set_weights([*_layers_above_cut(model), *head], weights)


def _layers_above_cut(model: Any) -> list[Any]:
    layers = backbone_of(model).layers
    return layers[[layer.name for layer in layers].index(CUT) + 1 :]  # type: ignore[no-any-return]


def _efficientnet(size: int, include_top: bool = False) -> Any:
    """Drop-connect is off: it lies in the trunk, and Keras 3.15 would run it under `fit`."""
    backbone = keras.applications.EfficientNetB0(
        include_top=include_top, weights=None, input_shape=(size, size, 3)
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
            # Never drawn from again, but saved: a fixed value keeps files equal.
            layer.seed_generator.state.assign([0, 0])
    return backbone


def _augmentation(params: AugmentationParams, size: int, seed: int) -> Any:
    """The variations of `params` as Keras's own layers, which act only while training.

    Without `zoom_out_prob`, for which Keras has no layer. Color jitter brightens each
    channel by its own amount.
    """
    layers = keras.layers
    geometry: list[Any] = [
        layers.RandomRotation(params.rotation / 360, fill_mode="reflect", seed=seed),
        layers.RandomZoom(params.zoom, fill_mode="reflect", seed=seed + 1),
        layers.RandomTranslation(params.shift, params.shift, fill_mode="reflect", seed=seed + 2),
    ]
    if params.horizontal_flip:
        geometry.append(layers.RandomFlip("horizontal", seed=seed + 3))
    color = [
        layers.RandomBrightness(params.brightness, seed=seed + 4),
        layers.RandomContrast(params.contrast, seed=seed + 5),
    ]
    picture = keras.Input((size, size, 3))
    channels = [
        layers.RandomBrightness(params.color_jitter, seed=seed + 6 + channel)(
            picture[..., channel : channel + 1]
        )
        for channel in range(3)
    ]
    color.append(keras.Model(picture, layers.Concatenate()(channels), name="channels"))
    return keras.Sequential([keras.Input((size, size, 3)), *geometry, *color], name="augmentation")


def _with_fresh_names(build: Callable[[], Built]) -> Built:
    """Call `build` where automatic layer names start from the beginning.

    Keras counts them per thread. Otherwise the names in a saved file would depend on what
    the process had built before. A distribution strategy is per thread, too.
    """
    strategy = tf.distribute.get_strategy()

    def scoped() -> Built:
        with strategy.scope():
            return build()

    with ThreadPoolExecutor(max_workers=1) as fresh:
        return fresh.submit(scoped).result()
