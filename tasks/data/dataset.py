"""The dataset that preprocess writes and later stages read.

`artifacts/dataset/` holds `images.npy`, uint8 (n, size, size, 3), rows sorted by (split,
label, name), then the synthetic hands, and `index.json` with the name, label and split
of each photo and the number of synthetic hands of each class.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.params import LABELS

IMAGES = "images.npy"
INDEX = "index.json"
SYNTHETIC = "synthetic"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Preprocessed photos of all splits, one row each.

    Args:
        images: uint8, (n, size, size, 3), RGB in [0, 255]; memory-mapped, read-only.
        labels: int64, (n,); index into `tasks.params.LABELS`.
        splits: `train`, `val` or `test` for each photo, `synthetic` for a rendered hand.
    """

    images: NDArray[np.uint8]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: tuple[str, ...]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of one split, ascending."""
        return np.flatnonzero(np.array(self.splits) == split).astype(np.int64)


def open_dataset(folder: Path) -> Dataset:
    """Open a dataset; pictures are read from disk when they are used.

    Raises:
        DataError: the folder is missing, or its two files do not belong together.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        images = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
        photos, size = list(index["photos"]), index["image_size"]
        photos += [
            {"name": f"synthetic/{label}/{number}", "label": label, "split": SYNTHETIC}
            for label in LABELS
            for number in range(index.get("synthetic", 0))
        ]
        expected = (len(photos), size, size, 3)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"{IMAGES} is {images.dtype} {images.shape}, not uint8 {expected}")
        return Dataset(
            images=images,
            names=tuple(photo["name"] for photo in photos),
            labels=np.array([LABELS.index(photo["label"]) for photo in photos], dtype=np.int64),
            splits=tuple(photo["split"] for photo in photos),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The dataset in '{folder}' cannot be opened ({error}). Run the preprocess stage again."
        ) from error
