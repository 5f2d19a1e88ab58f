"""Erasing: a patch of a photo's feature map is set to zero while the tail learns.

Zhong et al., Random Erasing Data Augmentation, 2020, on stored features in place of
pixels, as DropBlock does (Ghiasi et al., 2018). A tail that never knows which finger or
which bit of background it will miss leans on more of the hand.
"""

import numpy as np
from numpy.typing import NDArray

LARGEST = 3 / 7
"""Of a side of the map; three of the seven places of a photo."""


def erase_patches(
    features: NDArray[np.float32], random: np.random.Generator, probability: float
) -> NDArray[np.float32]:
    """Set one rectangle of some photos' feature maps to zero.

    Args:
        features: float32, (batch, h, w, channels).
        random: draws whose map, where and how large.
        probability: that a photo loses a patch.

    Returns:
        float32, of the same shape; `features` itself where nothing is erased, and where
        the map is too small to lose a patch and keep the rest.
    """
    count, height, width, _ = features.shape
    if probability == 0 or min(height, width) < 2:
        return features
    erased = np.less(random.random(count), probability)
    rows, columns = (_span(random, count, side) for side in (height, width))
    patch = erased[:, None, None] & rows[:, :, None] & columns[:, None, :]
    return np.where(patch[..., None], np.float32(0), features)


def _span(random: np.random.Generator, count: int, side: int) -> NDArray[np.bool_]:
    """Draw places in a row for each photo: bool, (count, side)."""
    length = random.integers(1, max(int(side * LARGEST), 1) + 1, count)
    start = random.integers(0, side - length + 1)
    place = np.arange(side)
    inside: NDArray[np.bool_] = (place >= start[:, None]) & (place < (start + length)[:, None])
    return inside
