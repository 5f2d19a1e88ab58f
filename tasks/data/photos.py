"""The photos in `data/`."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import joblib
import numpy as np
from numpy.typing import NDArray

from tasks.data.images import decode
from tasks.errors import DataError, ImageError
from tasks.params import LABELS
from tasks.project import FOLDERS
from tasks.stage import Progress

Result = TypeVar("Result")


@dataclass(frozen=True, order=True)
class Photo:
    """The photo `data/<folder>/<label>/<name>`."""

    folder: str
    label: str
    name: str

    @property
    def key(self) -> str:
        """Path below `data/`, with forward slashes."""
        return f"{self.folder}/{self.label}/{self.name}"


def find_photos(data: Path) -> list[Photo]:
    """List `data/`, sorted by folder, label and name; hidden files are not photos.

    Raises:
        DataError: there is no `train/`, a label is unknown, or a name is not UTF-8.
    """
    if not (data / "train").is_dir():
        raise DataError(
            f"There are no photos to train on: '{data}' has no train/ folder. Import photos, "
            "or render the sample."
        )
    found = []
    for folder in FOLDERS:
        for path in (data / folder).glob("*/*"):
            if path.name.startswith("."):
                continue
            if path.parent.name not in LABELS:
                raise DataError(
                    f"'{path.parent.name}' in '{data / folder}' is not a label. Rename the "
                    f"folder to one of {', '.join(LABELS)}, or move it out of data/."
                )
            photo = Photo(folder, path.parent.name, path.name)
            # Bytes that Python could not decode.
            if any("\udc80" <= character <= "\udcff" for character in path.name):
                raise DataError(f"A name must be UTF-8, and {photo.key!a} is not. Rename the file.")
            found.append(photo)
    return sorted(found)


def name_photos(photos: Sequence[Photo]) -> dict[str, str]:
    """The unique name by which a dataset knows each photo's key.

    Imported photos are named by their content, wherever they are. Photos that were put
    into `data/` by hand may share a name, and are named by their keys.
    """
    shared = Counter(photo.name for photo in photos)
    return {photo.key: photo.name if shared[photo.name] == 1 else photo.key for photo in photos}


def count_classes(photos: Sequence[Photo]) -> dict[str, dict[str, int]]:
    """Count photos by folder and label; `test` only if there are test photos.

    Raises:
        DataError: a class has no photo in one of the folders.
    """
    found = Counter((photo.folder, photo.label) for photo in photos)
    folders = [name for name in FOLDERS if name == "train" or any(f == name for f, _ in found)]
    missing = [f"{f}/{label}" for f in folders for label in LABELS if not found[f, label]]
    if missing:
        raise DataError(
            f"Every class needs photos in {' and '.join(folders)}, but there are none in "
            f"{', '.join(missing)}. Import photos of these classes."
        )
    return {folder: {label: found[folder, label] for label in LABELS} for folder in folders}


def check_trainable(photos: Sequence[Photo]) -> None:
    """Raise `DataError` if a class has too few photos for all splits."""
    counts = count_classes(photos)
    needed = 2 if "test" in counts else 3
    few = [f"{label} ({n})" for label, n in counts["train"].items() if n < needed]
    if few:
        raise DataError(
            f"Too few photos to train on: every class needs {needed} or more, and these have "
            f"fewer: {', '.join(few)}. Import more photos of these classes."
        )


def each_photo(
    work: Callable[[NDArray[np.uint8]], Result],
    data: Path,
    photos: Sequence[Photo],
    progress: Progress,
    what: str,
) -> Iterator[Result]:
    """Decode photos in threads, and yield `work` of each one's uint8 (height, width, 3) RGB.

    Raises:
        DataError: a stored photo cannot be decoded.
    """

    def read(photo: Photo) -> Result:
        path = data / photo.key
        try:
            return work(decode(path.read_bytes()))
        except (ImageError, OSError) as error:
            raise DataError(
                f"The stored photo '{path}' cannot be read ({error}). Restore it with "
                "'dvc checkout', or remove it and import it again."
            ) from error

    pool = joblib.Parallel(min(4, joblib.cpu_count()), prefer="threads", return_as="generator")
    for done, result in enumerate(pool(joblib.delayed(read)(photo) for photo in photos), start=1):
        progress(what, done, len(photos))
        yield result
