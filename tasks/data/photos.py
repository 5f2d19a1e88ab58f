"""The photos in `data/`: which there are, and reading many of them at once."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.data.images import look
from tasks.errors import DataError, ImageError
from tasks.params import LABELS
from tasks.project import FOLDERS
from tasks.stage import Progress, in_order

Result = TypeVar("Result")


@dataclass(frozen=True, order=True)
class Photo:
    """One stored photo: `data/<folder>/<label>/<name>`."""

    folder: str
    label: str
    name: str

    @property
    def key(self) -> str:
        """Path below `data/`, with forward slashes; what reports name it by."""
        return f"{self.folder}/{self.label}/{self.name}"


def find_photos(data: Path) -> list[Photo]:
    """List what `data/` holds, sorted by folder, label and name.

    Args:
        data: holds `train/<label>/*` and optionally `test/<label>/*`.

    Returns:
        The photos; files whose name starts with a dot are not photos.

    Raises:
        DataError: `data/train` is missing, a label is none of `LABELS`, or a name is no text.
    """
    if not (data / "train").is_dir():
        raise DataError(
            f"There are no photos to train on. Received: '{data}' without a train/ folder. "
            "Import photos, or render the sample."
        )
    found = []
    for folder in FOLDERS:
        for path in (data / folder).glob("*/*"):
            if path.name.startswith("."):
                continue
            if path.parent.name not in LABELS:
                raise DataError(
                    f"Label must be a folder named 0 to 5. Received: '{path.parent.name}' "
                    f"({folder}/{path.parent.name}). Rename the folder, or leave it out."
                )
            found.append(_listed(folder, path))
    return sorted(found)


def _listed(folder: str, path: Path) -> Photo:
    photo = Photo(folder, path.parent.name, path.name)
    try:
        photo.name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"A photo's name must be text in UTF-8. Received: {photo.key!a}. Rename the "
            "file, or bring it in with `handsigns import`, which names photos itself."
        ) from None
    return photo


def name_photos(photos: Sequence[Photo]) -> dict[str, str]:
    """Give each photo a name of its own, by which splits, features and comparisons know it.

    Import names photos by what they hold, so that a name says which photo it is wherever
    it lies. Photos that were put there by hand may share one, and are named by their path.

    Args:
        photos: as `find_photos` lists them.

    Returns:
        A name for each photo's key.
    """
    shared = Counter(photo.name for photo in photos)
    return {photo.key: photo.name if shared[photo.name] == 1 else photo.key for photo in photos}


def count_classes(photos: Sequence[Photo]) -> dict[str, dict[str, int]]:
    """Count photos by folder and label.

    Args:
        photos: as `find_photos` lists them.

    Returns:
        `{"train": {"0": 180, ...}, "test": {...}}`; no `test` where there is none.

    Raises:
        DataError: a class has no photo in one of the folders.
    """
    found = Counter((photo.folder, photo.label) for photo in photos)
    folders = [name for name in FOLDERS if name == "train" or any(f == name for f, _ in found)]
    missing = [f"{f}/{label}" for f in folders for label in LABELS if not found[f, label]]
    if missing:
        raise DataError(
            f"Every class needs photos in {' and '.join(folders)}. Received: none in "
            f"{', '.join(missing)}. Import photos of these classes."
        )
    return {folder: {label: found[folder, label] for label in LABELS} for folder in folders}


def each_photo(
    work: Callable[[NDArray[np.uint8]], Result],
    data: Path,
    photos: Sequence[Photo],
    progress: Progress,
    what: str,
) -> Iterator[Result]:
    """Read photos on a few threads and give what `work` makes of each, in order.

    Only as many full-size pictures as there are threads are in memory at once.

    Args:
        work: takes uint8 (height, width, 3), RGB; called on the reading thread.
        data: the folder the photos are in.
        photos: which to read.
        progress: told after each photo.
        what: what progress is told.

    Yields:
        `work`'s result for each photo, in the order of `photos`.

    Raises:
        DataError: a stored file cannot be decoded; the message names it.
    """

    def read(photo: Photo) -> Result:
        return work(_read(data / photo.key))

    workers = min(4, os.cpu_count() or 1)
    for done, result in enumerate(in_order(read, photos, workers), start=1):
        progress(what, done, len(photos))
        yield result


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        return look(path.read_bytes())
    except (ImageError, OSError) as error:
        raise DataError(
            f"A stored photo cannot be read ({error}). Received: '{path}'. "
            "Restore it with 'dvc checkout', or remove it and import again."
        ) from error
