"""Accuracy under common corruptions.

The kinds are those of Hendrycks and Dietterich, Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations, 2019, that a handheld phone causes.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.model.inference import Classifier
from tasks.scoring.metrics import DIGITS, wilson_interval
from tasks.stage import Progress, silent

Image = NDArray[np.uint8]

MAX_PHOTOS = 96
"""Photos that are corrupted, balanced over the classes; each kind scores all of them."""

ROTATION = 12.0
"""Degrees, either way."""
BRIGHTNESS = 0.25
"""Share that levels are scaled by, up and down."""
SCALE = 0.15
"""Share of the size, either way."""
BLUR_SIGMA = 1 / 64
"""Share of the side."""
JPEG_QUALITY = 40


def robustness(
    classifier: Classifier,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score a model on corrupted test photos.

    Nothing is random: photos alternate between the two directions of a corruption.

    Args:
        images: uint8, (n, d, d, 3), RGB; as the dataset stores them.
        labels: int64, (n,); 0 to 5.

    Returns:
        `photos`, and by kind the `accuracy` and its 95 % Wilson `interval`.
    """
    rows = balanced_rows(labels, MAX_PHOTOS)
    accuracy: dict[str, float] = {}
    interval: dict[str, list[float]] = {}
    for number, (name, corrupt) in enumerate(CORRUPTIONS.items(), start=1):
        corrupted = [corrupt(images[row], 1 - 2 * (at % 2)) for at, row in enumerate(rows)]
        predicted = classifier.probabilities(np.stack(corrupted)).argmax(axis=1)
        right = int((predicted == labels[rows]).sum())
        accuracy[name] = round(right / len(rows), DIGITS)
        interval[name] = [round(bound, DIGITS) for bound in wilson_interval(right, len(rows))]
        progress("score corrupted photos", number, len(CORRUPTIONS))
    return {"photos": len(rows), "accuracy": accuracy, "interval": interval}


def balanced_rows(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Choose at most `most` rows, the first of each class; int64, ascending."""
    if len(labels) <= most:
        return np.arange(len(labels), dtype=np.int64)
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranks[members] = np.arange(len(members))
    return np.sort(np.argsort(ranks, kind="stable")[:most]).astype(np.int64)


def _rotation(image: Image, direction: int) -> Image:
    return _transform(image, direction * ROTATION, 1.0)


def _brightness(image: Image, direction: int) -> Image:
    return cv2.convertScaleAbs(image, alpha=1 + direction * BRIGHTNESS)  # type: ignore[no-any-return]


def _blur(image: Image, direction: int) -> Image:
    return cv2.GaussianBlur(image, (0, 0), len(image) * BLUR_SIGMA)  # type: ignore[no-any-return]


def _scale(image: Image, direction: int) -> Image:
    return _transform(image, 0.0, 1 + direction * SCALE)


def _jpeg(image: Image, direction: int) -> Image:
    # The codec takes BGR and treats red and blue differently.
    content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    decoded: Image = cv2.imdecode(content, cv2.IMREAD_COLOR)  # type: ignore[assignment]
    return np.ascontiguousarray(decoded[..., ::-1])


def _transform(image: Image, degrees: float, scale: float) -> Image:
    side = len(image)
    matrix = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), degrees, scale)
    return cv2.warpAffine(  # type: ignore[no-any-return]
        image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )


CORRUPTIONS: dict[str, Callable[[Image, int], Image]] = {
    "rotation": _rotation,
    "brightness": _brightness,
    "blur": _blur,
    "scale": _scale,
    "jpeg": _jpeg,
}
