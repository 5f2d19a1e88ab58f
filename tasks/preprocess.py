"""Stage: split the photos, and resize them into one array.

`artifacts/dataset/` holds `images.npy`, uint8 (n, size, size, 3), rows sorted by (split,
label, name), then the synthetic hands by label, and `index.json`: the name, label and
split of each photo, counts, the number of synthetic hands of each class, and of test
photos with a near-duplicate in train or val (`leaks`).
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import IMAGES, INDEX
from tasks.data.images import resize
from tasks.data.photos import Photo, count_classes, each_photo, find_photos, name_photos
from tasks.data.splits import stratified_group_split
from tasks.errors import DataError
from tasks.io import atomic_directory, write_json
from tasks.params import LABELS, SplitParams
from tasks.stage import Context, stage_main

SPLITS = ("train", "val", "test")


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/dataset/` from `data/` and `artifacts/audit.json`."""
    project, params = context.project, context.params
    found = find_photos(project.data)
    audit = _read_audit(project.audit, found)
    excluded = {entry["photo"] for entry in audit["excluded"]}
    names = name_photos(found)
    photos = [photo for photo in found if photo.key not in excluded]
    group_of = {key: number for number, keys in enumerate(audit["groups"]) for key in keys}
    split_of = split_photos(photos, group_of, params.split, params.seed)
    photos.sort(key=lambda photo: (split_of[photo.key], photo.label, names[photo.key]))
    size = params.preprocess.image_size
    hands = _synthetic_hands(context)
    with atomic_directory(project.dataset) as folder:
        pictures = each_photo(
            partial(resize, params=params.preprocess),
            project.data,
            photos,
            context.progress,
            "resize photos",
        )
        # Written, not memory-mapped: a mapped page that finds no room kills the process.
        with (folder / IMAGES).open("wb") as file:
            shape = (len(photos) + len(hands), size, size, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for picture in chain(pictures, (resize(hand, params.preprocess) for hand in hands)):
                file.write(picture.tobytes())
        counts = Counter(split_of.values())
        index = {
            "image_size": size,
            "counts": {split: counts[split] for split in SPLITS},
            "leaks": count_cross_split_duplicates(split_of, group_of),
            "synthetic": len(hands) // len(LABELS),
            "photos": [
                {"name": names[photo.key], "label": photo.label, "split": split_of[photo.key]}
                for photo in photos
            ],
        }
        write_json(folder / INDEX, index)


def split_photos(
    photos: Sequence[Photo], group_of: Mapping[str, int], shares: SplitParams, seed: int
) -> dict[str, str]:
    """Split of each photo's key; an official test stays as it is.

    Args:
        group_of: number of the group of near-duplicates of a key, if it is in one.
    """
    rest = [photo for photo in photos if photo.folder == "train"]
    split_of = {photo.key: "test" for photo in photos if photo.folder == "test"}
    # Photos of two labels in one group are near-duplicates of excluded photos only.
    groups: dict[tuple[str, int | str], int] = {}
    for photo in rest:
        groups.setdefault((photo.label, group_of.get(photo.key, photo.key)), len(groups))
    splits = stratified_group_split(
        names=[photo.name for photo in rest],
        labels=[photo.label for photo in rest],
        groups=[groups[photo.label, group_of.get(photo.key, photo.key)] for photo in rest],
        shares={"val": shares.val} if split_of else {"test": shares.test, "val": shares.val},
        seed=seed,
    )
    return split_of | {photo.key: split for photo, split in zip(rest, splits, strict=True)}


def count_cross_split_duplicates(split_of: Mapping[str, str], group_of: Mapping[str, int]) -> int:
    """Count test photos with a near-duplicate that the model is trained or chosen on."""
    seen = defaultdict(set)
    for key, group in group_of.items():
        if key in split_of:
            label = key.split("/")[1]
            seen[group, label].add(split_of[key])
    return sum(
        split_of.get(key) == "test" and len(seen[group, key.split("/")[1]]) > 1
        for key, group in group_of.items()
    )


def _synthetic_hands(context: Context) -> NDArray[np.uint8]:
    """The rendered hands by label, (n, size, size, 3)."""
    path = context.project.synthetic
    if not context.params.synthetic.per_class:
        return np.empty((0, 1, 1, 3), np.uint8)
    try:
        hands: NDArray[np.uint8] = np.concatenate(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The synthetic hands in '{path}' cannot be read ({error}). "
            "Run the synthetic stage again."
        ) from error
    return hands


def _read_audit(path: Path, photos: Sequence[Photo]) -> dict[str, Any]:
    try:
        audit: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The audit '{path}' cannot be read ({error}). Run the audit stage again."
        ) from error
    if audit["counts"] != count_classes(photos):
        raise DataError(
            f"The audit is of other photos: {audit['photos']} were audited, and data/ has "
            f"{len(photos)}. Run the audit stage again."
        )
    return audit


if __name__ == "__main__":
    stage_main(run)
