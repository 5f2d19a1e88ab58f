"""Stage: split the photos, and resize them into one array.

`images.npy` is uint8 (n, size, size, 3), rows sorted by (split, label, name), then the synthetic
hands by label; `leaks` in `index.json` counts test photos with a near-duplicate in train or val.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

import numpy as np

from tasks.data.dataset import (
    IMAGES,
    INDEX,
    Photo,
    find_photos,
    name_photos,
    stratified_group_split,
)
from tasks.data.images import each_photo, resize
from tasks.io import atomic_directory, read_json, write_json
from tasks.params import Params
from tasks.stage import Context


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/dataset/` from `data/` and `artifacts/audit.json`."""
    project, params = context.project, context.params
    found = find_photos(project.data)
    audit = read_json(project.audit)
    excluded = {entry["photo"] for entry in audit["excluded"]}
    names = name_photos(found)
    photos = [photo for photo in found if photo.key not in excluded]
    group_of = {key: number for number, keys in enumerate(audit["groups"]) for key in keys}
    split_of = split_photos(photos, group_of, params)
    photos.sort(key=lambda photo: (split_of[photo.key], photo.label, names[photo.key]))
    hands = np.concatenate(np.load(project.synthetic)) if params.synthetic.per_class else ()
    size = params.preprocess.image_size
    resized = partial(resize, params=params.preprocess)
    paths = [project.data / photo.key for photo in photos]
    counts = Counter(split_of.values())
    with atomic_directory(project.dataset) as folder:
        # Written, not memory-mapped: a mapped page that finds no room kills the process.
        with (folder / IMAGES).open("wb") as file:
            shape = (len(photos) + len(hands), size, size, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            pictures = each_photo(resized, paths, context.progress, "resize photos")
            for picture in chain(pictures, map(resized, hands)):
                file.write(picture.tobytes())
        index = {
            "image_size": size,
            "counts": {split: counts[split] for split in ("train", "val", "test")},
            "leaks": count_cross_split_duplicates(split_of, group_of),
            "labels": params.labels,
            "synthetic": len(hands) // len(params.labels),
            "photos": [
                {"name": names[photo.key], "label": photo.label, "split": split_of[photo.key]}
                for photo in photos
            ],
        }
        write_json(folder / INDEX, index)


def split_photos(
    photos: Sequence[Photo], group_of: Mapping[str, int], params: Params
) -> dict[str, str]:
    """Split of each photo's key; near-duplicates have one number in `group_of`."""
    rest = [photo for photo in photos if photo.folder == "train"]
    split_of = {photo.key: "test" for photo in photos if photo.folder == "test"}
    test = {} if split_of else {"test": params.split.test}
    splits = stratified_group_split(
        names=[photo.name for photo in rest],
        labels=[photo.label for photo in rest],
        groups=[group_of.get(photo.key, -1 - row) for row, photo in enumerate(rest)],
        shares={**test, "val": params.split.val},
        seed=params.seed,
        classes=params.labels,
    )
    return split_of | {photo.key: split for photo, split in zip(rest, splits, strict=True)}


def count_cross_split_duplicates(split_of: Mapping[str, str], group_of: Mapping[str, int]) -> int:
    """Count test photos with a near-duplicate that the model is trained or chosen on."""
    used = {group for key, group in group_of.items() if split_of.get(key) in ("train", "val")}
    return sum(split_of.get(key) == "test" and group in used for key, group in group_of.items())
