"""One size for every photo, in training, evaluation and prediction alike."""

import cv2
import numpy as np
from numpy.typing import NDArray


def shrink(picture: NDArray[np.uint8], detail: int) -> NDArray[np.uint8]:
    """Bring one picture to the size every photo is trained, scored and predicted at.

    The largest central square is kept. Reducing averages over areas, so that no
    pixel is dropped and fine patterns do not alias; enlarging is bilinear.

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
