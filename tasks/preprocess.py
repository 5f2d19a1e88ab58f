"""Stage: every kept photo, split and shrunk, as one array.

`artifacts/dataset/` holds `images.npy`, uint8 (n, detail, detail, 3), rows sorted by
(split, label, name), and `index.json`, which names the rows, counts them and says how
many test photos have a twin among them that is trained or chosen on (`leaks`).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.dataset import IMAGES, INDEX
from tasks.data.images import shrink
from tasks.data.near_duplicates import group
from tasks.data.photos import Photo, count_classes, each_photo, find_photos, name_photos
from tasks.data.splits import assign
from tasks.errors import DataError
from tasks.io import atomic_directory, write_json
from tasks.params import SplitParams
from tasks.stage import Context, stage_main

SPLITS = ("train", "val", "test")


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/dataset/` from `data/` and `artifacts/audit.json`.

    Raises:
        DataError: the audit is missing or of other photos, a class is too small to
            split, or a file cannot be read.
    """
    project, params = context.project, context.params
    found = find_photos(project.data)
    audit = _read_audit(project.audit, found)
    excluded = {entry["photo"] for entry in audit["excluded"]}
    names = name_photos(found)
    photos = [photo for photo in found if photo.key not in excluded]
    pairs = [(left, right) for left, right in (pair["photos"] for pair in audit["twins"])]
    split_of = split_photos(photos, pairs, params.split, params.seed)
    photos.sort(key=lambda photo: (split_of[photo.key], photo.label, names[photo.key]))
    detail = params.preprocess.detail
    with atomic_directory(project.dataset) as folder:
        reading = each_photo(
            partial(shrink, detail=detail), project.data, photos, context.progress, "shrink photos"
        )
        # Written and not mapped: a mapped page that finds no room kills the process.
        with (folder / IMAGES).open("wb") as file:
            shape = (len(photos), detail, detail, 3)
            head = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, head)
            for image in reading:
                file.write(image.tobytes())
        counts = Counter(split_of.values())
        index = {
            "detail": detail,
            "counts": {split: counts[split] for split in SPLITS},
            "leaks": count_leaks(split_of, pairs),
            "photos": [
                {"name": names[photo.key], "label": photo.label, "split": split_of[photo.key]}
                for photo in photos
            ],
        }
        write_json(folder / INDEX, index)


def split_photos(
    photos: Sequence[Photo], pairs: Sequence[tuple[str, str]], shares: SplitParams, seed: int
) -> dict[str, str]:
    """Split the photos that are kept; an official test stays what it is.

    Args:
        photos: those that are not excluded.
        pairs: keys of twins; a pair with an excluded photo joins nothing.
        shares: shares held out; the test share only where there is no official test.
        seed: another seed gives another split.

    Returns:
        `train`, `val` or `test` for each photo's key.

    Raises:
        DataError: a class has too few photos to be in every split.
    """
    rest = [photo for photo in photos if photo.folder == "train"]
    split_of = {photo.key: "test" for photo in photos if photo.folder == "test"}
    held_out = {"val": shares.val} if split_of else {"test": shares.test, "val": shares.val}
    row_of = {photo.key: row for row, photo in enumerate(rest)}
    joined = [(row_of[a], row_of[b]) for a, b in pairs if a in row_of and b in row_of]
    splits = assign(
        names=[photo.name for photo in rest],
        labels=[photo.label for photo in rest],
        groups=group(len(rest), joined),
        shares=held_out,
        seed=seed,
    )
    return split_of | {photo.key: split for photo, split in zip(rest, splits, strict=True)}


def count_leaks(split_of: Mapping[str, str], pairs: Sequence[tuple[str, str]]) -> int:
    """Count test photos whose twin the model is trained or chosen on.

    Looks at pairs, not at groups, so it checks what exclusion and split came to.

    Args:
        split_of: split of each photo that is kept, by key.
        pairs: keys of all twins found, excluded photos too.

    Returns:
        Number of test photos with a twin in train or val; 0 is what is wanted.
    """
    leaks = set()
    for pair in pairs:
        for photo, twin in (pair, pair[::-1]):
            if split_of.get(photo) == "test" and split_of.get(twin) in ("train", "val"):
                leaks.add(photo)
    return len(leaks)


def _read_audit(path: Path, photos: Sequence[Photo]) -> dict[str, Any]:
    try:
        audit: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The audit cannot be read ({error}). Received: '{path}'. Run the audit stage again."
        ) from error
    if audit["counts"] != count_classes(photos):
        raise DataError(
            f"The audit is of other photos. Received: {audit['photos']} audited, "
            f"{len(photos)} in data/. Run the audit stage again."
        )
    return audit


if __name__ == "__main__":
    stage_main(run)
