"""Overviews of photos: what the audit found, and what augmentation does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.data.dataset import Dataset, Photo
from tasks.io import atomic_write
from tasks.model.augment import augment
from tasks.params import Params

SAMPLES = 12
"""Photos of each class, and near-duplicate pairs, that the audit shows."""
PHOTOS, COPIES = 2, 5
"""Photos of each class, and augmented copies of each, that are shown at most."""
MAX_CLASSES = 40
SIDE = 96


def tile(pictures: Sequence[NDArray[np.uint8]], columns: int, gap: int = 3) -> NDArray[np.uint8]:
    """Lay out pictures of one size row by row on white."""
    side = pictures[0].shape[0]
    rows = -(-len(pictures) // columns)
    height, width = (count * (side + gap) - gap for count in (rows, columns))
    sheet = np.full((height, width, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (place * (side + gap) for place in divmod(number, columns))
        sheet[top : top + side, left : left + side] = picture
    return sheet


def draw_augmentation(path: Path, dataset: Dataset, params: Params) -> None:
    """Draw the first training photos of each class, one class a row, each with its copies."""
    copies = params.features.augmented_copies if params.training.mode == "cached" else 0
    numbers = range(min(copies, COPIES) + 1)
    train = dataset.rows("train")
    pictures = []
    for label in range(len(dataset.classes))[:MAX_CLASSES]:
        rows = train[dataset.labels[train] == label][:PHOTOS]
        pictures += [
            augment(
                dataset.images[row], dataset.names[row], n, params.seed, params.augmentation, SIDE
            )
            for row in rows
            for n in numbers
        ]
        blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
        pictures += [blank] * ((PHOTOS - len(rows)) * len(numbers))
    _save(path, tile(pictures, PHOTOS * len(numbers)))


def draw_audit(
    path: Path, report: dict[str, Any], photos: Sequence[Photo], pictures: NDArray[np.uint8]
) -> None:
    """Draw samples of each class, one class a row, and near-duplicate pairs below.

    `report` is the content of `audit.json`; pictures are uint8, (n, side, side, 3).
    """
    samples = []
    for label in [*report["counts"]["train"]][:MAX_CLASSES]:
        rows = [row for row, photo in enumerate(photos) if photo.label == label]
        samples += [pictures[rows[n * len(rows) // SAMPLES]] for n in range(SAMPLES)]
    sheets = [tile(samples, SAMPLES)]
    described = [*report["conflicts"], *report["across"], *report["closest"]]
    pairs = list(dict.fromkeys(tuple(pair["photos"]) for pair in described))[:SAMPLES]
    if pairs:
        rows_by_key = {photo.key: row for row, photo in enumerate(photos)}
        shown = [pictures[rows_by_key[key]] for pair in pairs for key in pair]
        white = np.full((SIDE // 4, sheets[0].shape[1], 3), 255, np.uint8)
        sheets += [white, tile(shown, SAMPLES)]
    _save(path, np.concatenate(sheets))


def _save(path: Path, sheet: NDArray[np.uint8]) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
