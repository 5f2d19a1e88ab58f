"""Augmented copies of photos."""

import hashlib

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.params import INPUT_SIZE, AugmentationParams


def enlarge(images: NDArray[np.uint8], size: int = INPUT_SIZE) -> NDArray[np.uint8]:
    """Enlarge photos as `tf.image.resize`; uint8 (n, d, d, 3) -> uint8 (n, size, size, 3)."""
    enlarged = np.empty((len(images), size, size, 3), np.uint8)
    transform = _affine(images.shape[1], size)
    for image, result in zip(images, enlarged, strict=True):
        result[...] = _warp(image, transform, size)
    return enlarged


def augment(
    image: NDArray[np.uint8],
    name: str,
    copy: int,
    seed: int,
    params: AugmentationParams,
    size: int = INPUT_SIZE,
) -> NDArray[np.uint8]:
    """Make one copy of a photo; uint8 (d, d, 3) -> uint8 (size, size, 3), RGB.

    Copy 0 is the photo itself. Random numbers depend on seed, name and copy; `params` scales them.
    """
    if copy == 0:
        return _warp(image, _affine(len(image), size), size)
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    random = np.random.default_rng([seed, copy, int.from_bytes(digest, "little")])
    flip = bool(random.random() < 0.5) and params.horizontal_flip
    angle, zoom, right, down, brightness, contrast, *channels = random.uniform(-1, 1, 9)
    recolored = _recolor(
        image,
        brightness=255 * params.brightness * brightness,
        contrast=1 + params.contrast * contrast,
        gains=1 + params.color_jitter * np.array(channels),
    )
    # The lowest `zoom_out_prob` of the range zoom out.
    scales = params.zoom_out_min, 1 - params.zoom, 1 + params.zoom
    transform = _affine(
        len(image),
        size,
        flip=flip,
        angle=np.deg2rad(params.rotation * angle),
        scale=float(np.interp((zoom + 1) / 2, (0, params.zoom_out_prob, 1), scales)),
        shift=(params.shift * right, params.shift * down),
    )
    return _warp(recolored, transform, size)


def _recolor(
    image: NDArray[np.uint8], brightness: float, contrast: float, gains: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Stretch each channel about its mean, as `tf.image.adjust_contrast`; shift and scale it."""
    means = np.array(cv2.mean(image)[:3])
    levels = np.arange(256)[:, np.newaxis]
    changed: NDArray[np.float64] = ((levels - means) * contrast + means + brightness) * gains
    table = np.rint(np.clip(changed, 0, 255)).astype(np.uint8)
    recolored: NDArray[np.uint8] = cv2.LUT(image, table[np.newaxis])
    return recolored


def _affine(
    source: int,
    size: int,
    flip: bool = False,
    angle: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.float64]:
    """Matrix that maps pixel centers of a picture with side `source` to side `size`."""
    factor = scale * size / source
    cosine, sine = factor * np.cos(angle), factor * np.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    if flip:
        linear[:, 0] *= -1
    center = np.full(2, (source - 1) / 2)
    target = (size - 1) / 2 + size * np.array(shift)
    return np.column_stack([linear, target - linear @ center])


def _warp(image: NDArray[np.uint8], transform: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Apply `transform`. Replicated borders continue arm and wall; no second hand appears."""
    return cv2.warpAffine(  # type: ignore[no-any-return]
        image, transform, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
