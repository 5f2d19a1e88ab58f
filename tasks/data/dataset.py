"""The photos in `data/`, their splits, and the dataset that preprocess makes of them."""

import hashlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.io import read_json
from tasks.params import list_labels
from tasks.project import FOLDERS

TRAIN = "train"
SYNTHETIC = "synthetic"
IMAGES = "images.npy"
INDEX = "index.json"

Groups = Sequence[int] | NDArray[np.int64]  # of near-duplicates of one class, by photo


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
    """List `data/`, sorted by folder, label and name; hidden files are not photos."""
    if not (data / TRAIN).is_dir():
        raise DataError(
            f"There are no photos to train on: '{data}' has no train/ folder. Import photos, "
            "or render the sample."
        )
    found = []
    for folder in FOLDERS:
        for path in (data / folder).glob("*/[!.]*"):
            photo = Photo(folder, path.parent.name, path.name)
            try:
                path.name.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"A name must be UTF-8, and {photo.key!a} is not. Rename the file."
                ) from error
            found.append(photo)
    return sorted(found)


def name_photos(photos: Sequence[Photo]) -> dict[str, str]:
    """The unique name by which a dataset knows each key: of a name that is shared, the key."""
    shared = Counter(photo.name for photo in photos)
    return {photo.key: photo.name if shared[photo.name] == 1 else photo.key for photo in photos}


def count_classes(photos: Sequence[Photo], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count photos by folder and label, none of them 0; `test` only if there are test photos."""
    found = Counter((photo.folder, photo.label) for photo in photos)
    for folder, label in sorted(found):
        if label not in labels:
            raise DataError(
                f"'{label}' in data/{folder} is not a label. Rename the folder to one of "
                f"{list_labels(labels)}, move it out of data/, or add it to labels in params.yaml."
            )
    folders = [name for name in FOLDERS if name == TRAIN or any(f == name for f, _ in found)]
    missing = [f"{f}/{label}" for f in folders for label in labels if not found[f, label]]
    if missing:
        raise DataError(
            f"Every class needs photos in {' and '.join(folders)}, but there are none in "
            f"{list_labels(missing)}. Import photos of these classes."
        )
    return {folder: {label: found[folder, label] for label in labels} for folder in folders}


def check_trainable(photos: Sequence[Photo], labels: Sequence[str]) -> None:
    """Raise `DataError` if a class has too few photos for all splits."""
    held_out = ["val"] if "test" in count_classes(photos, labels) else ["test", "val"]
    trained = [photo.label for photo in photos if photo.folder == TRAIN]
    groups_by_class(trained, range(len(trained)), held_out, labels)


def stratified_group_split(
    names: Sequence[str],
    labels: Sequence[str],
    groups: Groups,
    shares: Mapping[str, float],
    seed: int,
    classes: Sequence[str],
) -> list[str]:
    """Hash-based split of each class, with each group in one split and each class in every one.

    Each photo has a rank that depends on the seed and its name alone. That of a group is the
    highest of its photos' ranks, and the lowest are held out, so a photo that is added moves
    none from training to the test. If nearly all groups have m photos or more, the limits
    take into account that all m ranks lie below a limit with probability limit**m.
    `shares` are those of each split but `train`, the test first; met on average.
    """
    splits = [TRAIN] * len(names)
    by_class = groups_by_class(labels, groups, tuple(shares), classes)
    sizes = [len(rows) for found in by_class.values() for rows in found]
    size = np.quantile(sizes, 0.1, method="lower")
    for found in by_class.values():
        ranked = sorted(
            (max(_rank("split", seed, names[row]) for row in rows), rows) for rows in found
        )
        ranks = [rank for rank, _ in ranked]
        start, held_out = 0, 0.0
        for number, (split, share) in enumerate(shares.items()):
            held_out += share
            below = bisect_left(ranks, held_out ** (1.0 / size))
            # At least one group for this split, and for each of those that follow.
            stop = min(max(below, start + 1), len(ranked) - len(shares) + number)
            for _, rows in ranked[start:stop]:
                for row in rows:
                    splits[row] = split
            start = stop
    return splits


def groups_by_class(
    labels: Sequence[str], groups: Groups, held_out: Sequence[str], classes: Sequence[str]
) -> dict[str, list[list[int]]]:
    """Rows of each group of each class, which must have as many as there are splits."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(groups):
        members[int(number)].append(row)
    by_class: dict[str, list[list[int]]] = {label: [] for label in classes}
    for rows in members.values():
        by_class[labels[rows[0]]].append(rows)
    needed = len(held_out) + 1
    few = [f"{name} ({len(found)})" for name, found in by_class.items() if len(found) < needed]
    if few:
        raise DataError(
            f"Too few photos to train on: every class needs {needed} or more, one for each of "
            f"{', '.join([*held_out, TRAIN])} (near-duplicates count once), and these have fewer: "
            f"{list_labels(few)}. Import more photos of these classes."
        )
    return by_class


def stratified_sample(
    names: Sequence[str], labels: Sequence[str] | NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.int64]:
    """Row numbers of a share of each class, ascending, at least one each; nested by share."""
    classes: dict[object, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        classes[label].append(row)
    chosen: list[int] = []
    for rows in classes.values():
        ranked = sorted(rows, key=lambda row: _rank("subset", seed, names[row]))
        chosen += ranked[: max(1, int(fraction * len(rows) + 0.5))]
    return np.array(sorted(chosen), dtype=np.int64)


def _rank(purpose: str, seed: int, name: str) -> float:
    """Pseudo-random number in [0, 1)."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


@dataclass(frozen=True, eq=False)
class Dataset:
    """Preprocessed photos of all splits, one row each; rows are sorted by (split, label, name)."""

    images: NDArray[np.uint8]  # (n, size, size, 3), RGB; memory-mapped, read-only
    names: tuple[str, ...]
    labels: NDArray[np.int64]  # (n,); index into `classes`
    splits: tuple[str, ...]  # train, val, test, or synthetic for a rendered hand
    classes: tuple[str, ...]  # in the order of the model's outputs

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of one split, ascending."""
        return np.flatnonzero(np.array(self.splits) == split).astype(np.int64)


def open_dataset(folder: Path) -> Dataset:
    """Open a dataset; pictures are read from disk when they are used."""
    try:
        index = read_json(folder / INDEX)
        images = np.load(folder / IMAGES, mmap_mode="r")
        photos, classes = list(index["photos"]), tuple(index["labels"])
        number_of = {label: number for number, label in enumerate(classes)}
        photos += [
            {"name": f"synthetic/{label}/{number}", "label": label, "split": SYNTHETIC}
            for label in classes
            for number in range(index["synthetic"])
        ]
        if len(images) != len(photos):
            raise ValueError(f"{IMAGES} has {len(images)} photos, {INDEX} {len(photos)}")
        return Dataset(
            images=images,
            names=tuple(photo["name"] for photo in photos),
            labels=np.array([number_of[photo["label"]] for photo in photos], dtype=np.int64),
            splits=tuple(photo["split"] for photo in photos),
            classes=classes,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The dataset in '{folder}' cannot be opened ({error}). Run the preprocess stage again."
        ) from error
