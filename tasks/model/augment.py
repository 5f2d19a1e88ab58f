"""Augmented copies of photos."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.params import AugmentationParams

INPUT_SIZE = 224
"""Side of EfficientNetB0's input in pixels."""


def enlarge(images: NDArray[np.uint8], size: int = INPUT_SIZE) -> NDArray[np.uint8]:
    """Enlarge photos as they are: the plain view, number 0.

    Bilinear with half-pixel centres, as `tf.image.resize` does by default, rounded
    to the nearest level. Levels stay integers: a view is a picture like any other,
    four times smaller than as float32, and rounding moves a pixel by half a level
    of 255 at most.

    Args:
        images: uint8, (n, d, d, 3), RGB in [0, 255].
        size: side of the result in pixels.

    Returns:
        uint8, (n, size, size, 3).
    """
    large = np.empty((len(images), size, size, 3), np.uint8)
    plain = _placement(images.shape[1], size)
    for image, result in zip(images, large, strict=True):
        result[...] = _warp(image, plain, size)
    return large


def view(
    image: NDArray[np.uint8],
    name: str,
    number: int,
    seed: int,
    params: AugmentationParams,
    size: int = INPUT_SIZE,
) -> NDArray[np.uint8]:
    """Make one view of one photo; the same arguments always give the same bytes.

    What is drawn depends on `(seed, name, number)` alone, not on other photos, on
    their order or on the strengths in `params`, which only scale it.

    Args:
        image: uint8, (d, d, 3), RGB in [0, 255].
        name: the photo's file name.
        number: 0 for the plain view, 1 and up for augmented ones.
        seed: `seed` of params.yaml.
        params: strength of each variation.
        size: side of the result in pixels.

    Returns:
        uint8, (size, size, 3).
    """
    if number == 0:
        return _warp(image, _placement(len(image), size), size)
    key = [seed, number, _number_of(name)]
    random = np.random.default_rng(key)
    mirror = bool(random.random() < 0.5) and params.horizontal_flip
    angle, zoom, right, down, light, contrast, *channels = random.uniform(-1, 1, 9)
    coloured = _recolour(
        image,
        light=255 * params.brightness * light,
        contrast=1 + params.contrast * contrast,
        gains=1 + params.color_jitter * np.array(channels),
    )
    placement = _placement(
        len(image),
        size,
        mirror=mirror,
        angle=np.deg2rad(params.rotation * angle),
        zoom=_zoom((zoom + 1) / 2, params),
        shift=(params.shift * right, params.shift * down),
    )
    return _warp(coloured, placement, size)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep OpenCV from splitting single pictures, where the cores have other work.

    The setting is the whole process's; it is put back at the end.
    """
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _zoom(place: float, params: AugmentationParams) -> float:
    """Growth of the hand for a number drawn from [0, 1), small growth for small ones."""
    nearer = 1 + params.zoom
    return float(
        np.interp(
            place, (0, params.zoom_out_prob, 1), (params.zoom_out_min, 1 - params.zoom, nearer)
        )
    )


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def _recolour(
    image: NDArray[np.uint8], light: float, contrast: float, gains: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Stretch each channel about its mean, as `tf.image.adjust_contrast`, then shift and scale."""
    means = np.array(cv2.mean(image)[:3])
    levels = np.arange(256)[:, np.newaxis]
    changed: NDArray[np.float64] = ((levels - means) * contrast + means + light) * gains
    table = np.rint(np.clip(changed, 0, 255)).astype(np.uint8)
    coloured: NDArray[np.uint8] = cv2.LUT(image, table[np.newaxis])
    return coloured


def _placement(
    detail: int,
    size: int,
    mirror: bool = False,
    angle: float = 0.0,
    zoom: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.float64]:
    """Map pixel centres of the stored picture to pixel centres of the view.

    Args:
        detail: side of the stored picture.
        size: side of the view.
        mirror: left becomes right, before anything else.
        angle: turn about the centre, in radians.
        zoom: growth of what the picture shows.
        shift: to the right and down, as shares of the side.

    Returns:
        float64, (2, 3); what `cv2.warpAffine` takes.
    """
    scale = zoom * size / detail
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    if mirror:
        turn[:, 0] *= -1
    centre = np.full(2, (detail - 1) / 2)
    target = (size - 1) / 2 + size * np.array(shift)
    return np.column_stack([turn, target - turn @ centre])


def _warp(image: NDArray[np.uint8], placement: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Repeat the border beyond it: an arm and a wall go on, and no second hand appears."""
    warped: NDArray[np.uint8] = cv2.warpAffine(
        image, placement, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return warped
