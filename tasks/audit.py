"""Stage: examine the photos in `data/`, and find those that must not be trained on.

Near-duplicates with two labels are labelling errors, so both are excluded. A training
photo that is a near-duplicate of an official test photo is excluded, too. The test itself
is never changed.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import Photo, count_classes, find_photos, groups_by_class
from tasks.data.images import each_photo, resize_square
from tasks.data.near_duplicates import NearDuplicates, find_near_duplicates, perceptual_hash
from tasks.errors import DataError
from tasks.io import write_json
from tasks.params import AuditParams
from tasks.scoring.photo_sheets import draw_audit
from tasks.stage import Context, Progress, stage_main

COMPARED = 64
"""Side in pixels at which photos are compared."""
IMBALANCE = 3.0
"""Ratio of the largest class to the smallest above which the audit warns."""
CLOSEST = 100
"""Pairs in the report beside those of two labels, and those of train and test."""

Report = dict[str, Any]


@dataclass(frozen=True)
class ImageStats:
    """What the audit keeps of each photo: 12 KB, whatever its size."""

    pictures: NDArray[np.uint8]  # (n, 64, 64, 3)
    hashes: NDArray[np.uint64]  # perceptual hash of each picture
    mirrored: NDArray[np.uint64]  # that of its mirror image


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/audit.json` and `artifacts/plots/audit.png`."""
    project = context.project
    photos = find_photos(project.data)
    count_classes(photos, context.params.labels)
    stats = measure(project.data, photos, context.progress)
    report = audit(photos, stats, context.params.audit, context.params.labels)
    draw_audit(project.plots / "audit.png", report, photos, stats.pictures)
    write_json(project.audit, report)


def measure(data: Path, photos: Sequence[Photo], progress: Progress) -> ImageStats:
    """Decode every photo once; row i belongs to photo i."""
    pictures = np.empty((len(photos), COMPARED, COMPARED, 3), np.uint8)
    hashes, mirrored = np.empty((2, len(photos)), np.uint64)
    paths = [data / photo.key for photo in photos]
    for row, stats in enumerate(each_photo(_measure, paths, progress, "audit photos")):
        pictures[row], hashes[row], mirrored[row] = stats
    return ImageStats(pictures, hashes, mirrored)


def _measure(picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int, int]:
    small = resize_square(picture, COMPARED)
    mirror_image = np.ascontiguousarray(small[:, ::-1])
    return small, perceptual_hash(small), perceptual_hash(mirror_image)


def audit(
    photos: Sequence[Photo], stats: ImageStats, params: AuditParams, classes: Sequence[str]
) -> Report:
    """Build the content of `audit.json`."""
    counts = count_classes(photos, classes)
    folders = np.array([photo.folder for photo in photos])
    labels, label_ids = np.unique([photo.label for photo in photos], return_inverse=True)
    found = find_near_duplicates(
        stats.pictures,
        stats.hashes,
        stats.mirrored,
        label_ids + len(labels) * (folders == "test"),
        params.max_hash_distance,
        params.max_rms_difference,
    )
    left, right = found.pairs.T
    conflicts = label_ids[left] != label_ids[right]
    across = folders[left] != folders[right]

    def describe(rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [
            {"photos": [photos[row].key for row in pair], "rms": round(rms, 3)}
            for pair, rms in zip(found.pairs[rows].tolist(), found.rms[rows].tolist(), strict=True)
        ]

    _reject_two_labels(describe(np.flatnonzero(conflicts & (found.rms == 0))))
    excluded = _exclude(photos, found, found.pairs[conflicts])
    # Photos of two labels in one group are near-duplicates of excluded photos only.
    groups = found.groups * len(labels) + label_ids
    kept = [r for r, photo in enumerate(photos) if photo.folder == "train" and r not in excluded]
    held_out = ["val"] if "test" in counts else ["test", "val"]
    groups_by_class([photos[row].label for row in kept], groups[kept], held_out, classes)
    imbalance = round(max(counts["train"].values()) / min(counts["train"].values()), 3)
    warnings = [
        (conflicts.any(), f"{conflicts.sum()} pairs of near-duplicates have two labels"),
        (across.any(), f"{across.sum()} pairs of near-duplicates across train and test"),
        (imbalance > IMBALANCE, f"the largest class has {imbalance} times the smallest's photos"),
    ]
    return {
        "photos": len(photos),
        "counts": counts,
        "imbalance": imbalance,
        "groups": _keys_by_group(photos, groups),
        "duplicates": len(photos) - len(np.unique(found.groups)),
        "conflicts": describe(np.flatnonzero(conflicts)),
        "across": describe(np.flatnonzero(across)),
        "closest": describe(np.argsort(found.rms, kind="stable")[:CLOSEST]),
        "excluded": [{"photo": photos[row].key, **why} for row, why in sorted(excluded.items())],
        "warnings": [warning for applies, warning in warnings if applies],
    }


def _reject_two_labels(pairs: list[dict[str, Any]]) -> None:
    if pairs:
        named = "; ".join(" = ".join(pair["photos"]) for pair in pairs[:5])
        more = f"; and {len(pairs) - 5} more" if len(pairs) > 5 else ""
        raise DataError(
            f"The same picture has two labels: {named}{more}. Keep each picture only under its "
            "right label."
        )


def _exclude(
    photos: Sequence[Photo], found: NearDuplicates, conflicting: NDArray[np.int64]
) -> dict[int, dict[str, str]]:
    """Reason and near-duplicate of each training photo that must not be trained on."""
    conflicts = {row: other for pair in conflicting.tolist() for row, other in (pair, pair[::-1])}
    groups = found.groups.tolist()
    in_test = {groups[r]: photo.key for r, photo in enumerate(photos) if photo.folder == "test"}
    excluded = {}
    for row, representative in enumerate(found.representatives.tolist()):
        if photos[row].folder != "train":
            continue
        if groups[row] in in_test:
            twin = in_test[groups[row]]
            excluded[row] = {"reason": "near-duplicate in the official test", "of": twin}
        elif (other := conflicts.get(row, conflicts.get(representative))) is not None:
            twin = photos[other].key
            excluded[row] = {"reason": "near-duplicate with another label", "of": twin}
    return excluded


def _keys_by_group(photos: Sequence[Photo], groups: NDArray[np.int64]) -> list[list[str]]:
    """Photos of one label that are near-duplicates, and stay in one split."""
    members: dict[int, list[str]] = defaultdict(list)
    for photo, number in zip(photos, groups.tolist(), strict=True):
        members[number].append(photo.key)
    return [keys for keys in members.values() if len(keys) > 1]


if __name__ == "__main__":
    stage_main(run)
