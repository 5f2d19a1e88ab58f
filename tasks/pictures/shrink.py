"""One size for every photo, in training, evaluation and prediction alike."""

import cv2
import numpy as np
from numpy.typing import NDArray

SOFTNESS = 0.5
"""Standard deviation in pixels of the blur of a reduced photo; see `shrink`."""


def shrink(picture: NDArray[np.uint8], detail: int) -> NDArray[np.uint8]:
    """Bring one picture to the size every photo is trained, scored and predicted at.

    A photo that was larger is softened as well: thumbnails are softer than an average
    over areas leaves it, and with this its finest detail falls off as theirs does
    (docs/accuracy.md). A photo that comes at that size keeps its pixels.

    Args:
        picture: uint8, (height, width, 3), RGB.
        detail: side of the result in pixels.

    Returns:
        uint8, (detail, detail, 3); a new array.
    """
    small = resize_square(picture, detail)
    if min(picture.shape[:2]) <= detail:
        return small
    softened: NDArray[np.uint8] = cv2.GaussianBlur(small, (0, 0), SOFTNESS)
    return softened


def resize_square(picture: NDArray[np.uint8], detail: int) -> NDArray[np.uint8]:
    """Bring the largest central square to one size.

    Reducing averages over areas, so that no pixel is dropped and fine patterns do not
    alias; enlarging is bilinear.

    Args:
        picture: uint8, (height, width, 3), RGB.
        detail: side of the result in pixels.

    Returns:
        uint8, (detail, detail, 3); a new array.
    """
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(picture[top : top + side, left : left + side])
    if side == detail:
        return square.copy()
    method = cv2.INTER_AREA if side > detail else cv2.INTER_LINEAR
    shrunk: NDArray[np.uint8] = cv2.resize(square, (detail, detail), interpolation=method)
    return shrunk
