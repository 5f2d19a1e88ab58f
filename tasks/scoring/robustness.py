"""How accuracy holds when test photos are disturbed a little, as cameras disturb them.

The kinds are those of Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019, that a phone held by
a hand brings: it is tilted, too light or too dark, out of focus, nearer or further,
and it compresses.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tasks.model.inference import Classifier
from tasks.scoring.metrics import DIGITS
from tasks.stage import Progress, silent

Image = NDArray[np.uint8]
Corruption = Callable[[Image, int], Image]

MOST_PHOTOS = 96
"""Photos that are disturbed at most, evenly of each class: each kind scores all of them."""

TURN = 12.0
"""Degrees."""
LIGHT = 0.25
"""Share that levels are scaled by, up and down."""
NEARER = 0.15
"""Share of the size."""
BLUR = 1 / 64
"""Standard deviation of the blur as a share of the side: one pixel of 64."""
QUALITY = 40
"""Of JPEG, 1 to 95."""


def robustness(
    classifier: Classifier,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score a model on disturbed test photos.

    Nothing is drawn: of every two photos one is disturbed one way and one the other, so
    the same photos give the same numbers.

    Args:
        classifier: the model.
        images: uint8, (n, d, d, 3), RGB in [0, 255]; as the dataset holds them.
        labels: int64, (n,); 0 to 5.
        progress: told after each kind.

    Returns:
        `photos`, and by kind in `accuracy` the share that is read rightly, in
        `interval` its 95 % Wilson interval.
    """
    rows = evenly(labels, MOST_PHOTOS)
    accuracy: dict[str, float] = {}
    interval: dict[str, list[float]] = {}
    for number, (name, corrupt) in enumerate(CORRUPTIONS.items(), start=1):
        disturbed = [corrupt(images[row], 1 - 2 * (at % 2)) for at, row in enumerate(rows)]
        found = classifier.probabilities(np.stack(disturbed)).argmax(axis=1)
        right = int((found == labels[rows]).sum())
        bounds = binomtest(right, len(rows)).proportion_ci(method="wilson")
        accuracy[name] = round(right / len(rows), DIGITS)
        interval[name] = [round(float(bounds.low), DIGITS), round(float(bounds.high), DIGITS)]
        progress("disturb photos", number, len(CORRUPTIONS))
    return {"photos": len(rows), "accuracy": accuracy, "interval": interval}


def evenly(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Choose rows so that no class has many more than another.

    Args:
        labels: int64, (n,).
        most: rows at most.

    Returns:
        int64, ascending; the first photos of each class, which the dataset sorts by a
        hash of their content.
    """
    if len(labels) <= most:
        return np.arange(len(labels), dtype=np.int64)
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranks[members] = np.arange(len(members))
    return np.sort(np.argsort(ranks, kind="stable")[:most]).astype(np.int64)


def _turn(image: Image, way: int) -> Image:
    return _place(image, way * TURN, 1.0)


def _light(image: Image, way: int) -> Image:
    return cv2.convertScaleAbs(image, alpha=1 + way * LIGHT)  # type: ignore[no-any-return]


def _blur(image: Image, way: int) -> Image:
    return cv2.GaussianBlur(image, (0, 0), image.shape[0] * BLUR)  # type: ignore[no-any-return]


def _scale(image: Image, way: int) -> Image:
    return _place(image, 0.0, 1 + way * NEARER)


def _jpeg(image: Image, way: int) -> Image:
    # The codec takes BGR; red and blue are weighed differently there.
    coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    decoded: Image = cv2.imdecode(coded, cv2.IMREAD_COLOR)  # type: ignore[assignment]
    return np.ascontiguousarray(decoded[..., ::-1])


def _place(image: Image, degrees: float, scale: float) -> Image:
    side = image.shape[0]
    centre = ((side - 1) / 2, (side - 1) / 2)
    turn = cv2.getRotationMatrix2D(centre, degrees, scale)
    return cv2.warpAffine(  # type: ignore[no-any-return]
        image, turn, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )


CORRUPTIONS: dict[str, Corruption] = {
    "rotation": _turn,
    "brightness": _light,
    "blur": _blur,
    "scale": _scale,
    "jpeg": _jpeg,
}
