"""Augmentation inside the model: what `end_to_end` training varies photos by.

`tasks.pictures.augment` draws the views that stored features are of.
"""

from typing import Any

import keras

from tasks.params import AugmentationParams


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
        _channels(params.channel, size, seed + 6),
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
