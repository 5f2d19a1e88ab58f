"""The preprocessed photos as every later stage reads them.

`artifacts/dataset/` holds `images.npy`, uint8 (n, detail, detail, 3), rows sorted by
(split, label, name), and `index.json`, which names the rows; see `tasks.preprocess`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.params import LABELS

IMAGES = "images.npy"
INDEX = "index.json"


@dataclass(frozen=True, eq=False)
class Dataset:
    """The preprocessed photos of all splits; row i is the same photo everywhere.

    Args:
        images: uint8, (n, detail, detail, 3), RGB in [0, 255]; memory-mapped, read-only.
        names: file name of each photo, unique.
        labels: int64, (n,); index into `tasks.params.LABELS`.
        splits: `train`, `val` or `test` for each photo.
    """

    images: NDArray[np.uint8]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: tuple[str, ...]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Rows of one split, ascending.

        Args:
            split: `train`, `val` or `test`.

        Returns:
            int64, (m,); indices into `images`, `names`, `labels` and `splits`.
        """
        return np.flatnonzero(self._split_array == split).astype(np.int64)

    @cached_property
    def _split_array(self) -> NDArray[np.str_]:
        return np.array(self.splits, dtype=np.str_)


def open_dataset(folder: Path) -> Dataset:
    """Open what the preprocess stage wrote, without reading the pictures yet.

    Args:
        folder: `Project.dataset`.

    Returns:
        The dataset; its images are read from disk as they are used.

    Raises:
        DataError: the folder is missing, or its two files do not belong together.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        images = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
        photos = index["photos"]
        expected = (len(photos), index["detail"], index["detail"], 3)
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
            f"The preprocessed photos cannot be opened ({error}). Received: '{folder}'. "
            "Run the preprocess stage again."
        ) from error
