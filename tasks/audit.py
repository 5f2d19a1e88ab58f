"""Stage: examine the photos in `data/`, and find those that must not be trained on.

Near-duplicates with two labels are labelling errors, so both are excluded. A training
photo that is a near-duplicate of an official test photo is excluded, too. The test itself
is never changed.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree

from tasks.data.images import resize_square
from tasks.data.near_duplicates import NearDuplicates, find_near_duplicates, perceptual_hash
from tasks.data.photos import Photo, count_classes, each_photo, find_photos
from tasks.data.splits import require_enough
from tasks.errors import DataError
from tasks.io import write_json
from tasks.params import AuditParams
from tasks.scoring.photo_sheets import draw_audit
from tasks.stage import Context, Progress, stage_main

COMPARED = 64
"""Side in pixels at which photos are compared."""
IMBALANCE = 3.0
"""Ratio of the largest class to the smallest above which the audit warns."""

Report = dict[str, Any]


@dataclass(frozen=True)
class ImageStats:
    """What the audit keeps of each photo: 12 KB, whatever its size.

    Args:
        pictures: uint8, (n, 64, 64, 3).
        hashes: uint64, (n,); perceptual hash of each picture.
        mirrored: uint64, (n,); that of its mirror image.
        digests: SHA-256 of shape and pixels at full size.
        sizes: int64, (n, 2); height and width in pixels.
    """

    pictures: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    mirrored: NDArray[np.uint64]
    digests: tuple[bytes, ...]
    sizes: NDArray[np.int64]


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/audit.json` and `artifacts/plots/audit.png`."""
    project = context.project
    photos = find_photos(project.data)
    count_classes(photos)
    stats = measure(project.data, photos, context.progress)
    report = audit(photos, stats, context.params.audit)
    draw_audit(project.plots / "audit.png", report, photos, stats.pictures)
    write_json(project.audit, report)


def measure(data: Path, photos: Sequence[Photo], progress: Progress) -> ImageStats:
    """Decode every photo once; row i belongs to photo i."""
    pictures = np.empty((len(photos), COMPARED, COMPARED, 3), np.uint8)
    hashes, mirrored = np.empty((2, len(photos)), np.uint64)
    sizes = np.empty((len(photos), 2), np.int64)
    digests = []
    for row, stats in enumerate(each_photo(_measure, data, photos, progress, "audit photos")):
        pictures[row], hashes[row], mirrored[row], digest, sizes[row] = stats
        digests.append(digest)
    return ImageStats(pictures, hashes, mirrored, tuple(digests), sizes)


def audit(photos: Sequence[Photo], stats: ImageStats, params: AuditParams) -> Report:
    """Build the content of `audit.json`.

    Raises:
        DataError: a picture has two labels, or a class is missing or too small to split.
    """
    counts = count_classes(photos)
    _reject_two_labels(photos, stats.digests)
    places = {place: number for number, place in enumerate(sorted({_place(p) for p in photos}))}
    found = find_near_duplicates(
        stats.pictures,
        stats.hashes,
        stats.mirrored,
        np.array([places[_place(photo)] for photo in photos]),
        params.max_hash_distance,
        params.max_rms_difference,
    )
    groups = found.groups
    excluded = _exclude(photos, found, groups)
    kept = [r for r, p in enumerate(photos) if p.folder == "train" and r not in excluded]
    # As preprocess splits them: a group by label.
    label_groups = [groups[row] * len(places) + places[_place(photos[row])] for row in kept]
    held_out = ["val"] if "test" in counts else ["test", "val"]
    require_enough([photos[row].label for row in kept], label_groups, held_out)
    pairs = _describe_pairs(photos, found)
    report: Report = {
        "photos": len(photos),
        "counts": counts,
        "imbalance": round(max(counts["train"].values()) / min(counts["train"].values()), 3),
        "sizes": _sizes(stats.sizes),
        "groups": _keys_by_group(photos, groups),
        "duplicates": len(photos) - len(set(groups.tolist())),
        "pairs": pairs,
        "conflicts": [pair for pair in pairs if _differ(pair, 1)],
        "across": [pair for pair in pairs if _differ(pair, 0)],
        "excluded": [{"photo": photos[row].key, **why} for row, why in sorted(excluded.items())],
    }
    return report | {"warnings": _warnings(report)}


def _measure(
    picture: NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], int, int, bytes, tuple[int, int]]:
    small = resize_square(picture, COMPARED)
    height, width = picture.shape[:2]
    digest = hashlib.sha256(f"{height}x{width} ".encode() + picture.tobytes()).digest()
    mirror_image = np.ascontiguousarray(small[:, ::-1])
    return small, perceptual_hash(small), perceptual_hash(mirror_image), digest, (height, width)


def _place(photo: Photo) -> tuple[str, str]:
    return photo.folder, photo.label


def _reject_two_labels(photos: Sequence[Photo], digests: Sequence[bytes]) -> None:
    same: dict[bytes, list[Photo]] = defaultdict(list)
    for photo, digest in zip(photos, digests, strict=True):
        same[digest].append(photo)
    found = [group for group in same.values() if len({photo.label for photo in group}) > 1]
    if found:
        named = "; ".join(" = ".join(photo.key for photo in group) for group in found[:5])
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise DataError(
            f"The same picture has two labels: {named}{more}. Keep each picture only under its "
            "right label."
        )


def _exclude(
    photos: Sequence[Photo], found: NearDuplicates, groups: NDArray[np.int64]
) -> dict[int, dict[str, str]]:
    """Reason and near-duplicate of each training photo that must not be trained on."""
    conflicts: dict[int, int] = {}
    for left, right in found.pairs.tolist():
        if photos[left].label != photos[right].label:
            conflicts |= {left: right, right: left}
    in_test = {
        int(groups[r]): photo.key for r, photo in enumerate(photos) if photo.folder == "test"
    }
    excluded = {}
    for row, representative in enumerate(found.representatives.tolist()):
        if photos[row].folder != "train":
            continue
        if int(groups[row]) in in_test:
            twin = in_test[int(groups[row])]
            excluded[row] = {"reason": "near-duplicate in the official test", "of": twin}
        elif (other := conflicts.get(row, conflicts.get(representative))) is not None:
            twin = photos[other].key
            excluded[row] = {"reason": "near-duplicate with another label", "of": twin}
    return excluded


def _describe_pairs(photos: Sequence[Photo], found: NearDuplicates) -> list[dict[str, Any]]:
    """Pairs of two labels or of train and test, and the closest ones that join each group."""
    # No weight may be zero, which would be no edge.
    graph = coo_array((1.0 + found.rms, found.pairs.T), (len(photos), len(photos)))
    tree = coo_array(minimum_spanning_tree(graph))
    joining = set(zip(tree.row.tolist(), tree.col.tolist(), strict=True))
    return [
        {"photos": [photos[left].key, photos[right].key], "rms": round(rms, 3)}
        for (left, right), rms in zip(found.pairs.tolist(), found.rms.tolist(), strict=True)
        if (left, right) in joining or _place(photos[left]) != _place(photos[right])
    ]


def _differ(pair: Mapping[str, Any], part: int) -> bool:
    left, right = (key.split("/")[part] for key in pair["photos"])
    return bool(left != right)


def _keys_by_group(photos: Sequence[Photo], groups: NDArray[np.int64]) -> list[list[str]]:
    members: dict[int, list[str]] = defaultdict(list)
    for photo, number in zip(photos, groups.tolist(), strict=True):
        members[number].append(photo.key)
    return [keys for keys in members.values() if len(keys) > 1]


def _sizes(sizes: NDArray[np.int64]) -> dict[str, Any]:
    described: dict[str, Any] = {"distinct": len(np.unique(sizes, axis=0))}
    for name, values in zip(("height", "width"), sizes.T, strict=True):
        described[name] = {
            "min": int(values.min()),
            "median": float(np.median(values)),
            "max": int(values.max()),
        }
    return described


def _warnings(report: Report) -> list[str]:
    warnings = []
    if report["conflicts"]:
        warnings.append(f"{len(report['conflicts'])} pairs of near-duplicates have two labels")
    if report["across"]:
        warnings.append(f"{len(report['across'])} pairs of near-duplicates across train and test")
    if report["imbalance"] > IMBALANCE:
        warnings.append(f"the largest class has {report['imbalance']} times the smallest's photos")
    return warnings


if __name__ == "__main__":
    stage_main(run)
