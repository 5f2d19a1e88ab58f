"""Stage: what the photos in `data/` are like, and which must not be trained on.

Two photos are twins when their perceptual hashes are close and their pixels confirm
it, as they are or mirrored, for training shows each photo mirrored too. Near twins under
two labels are wrong labels, not hard examples, so neither is trained on; a training photo
whose twin is in the official test would let the model be examined on what it has seen.
Both kinds are named under `excluded`; the test itself is never changed.
"""

import hashlib
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree

from tasks.data.images import resize_square
from tasks.data.near_duplicates import Twins, find_twins, group, perceptual_hash
from tasks.data.photos import Photo, count_classes, each_photo, find_photos
from tasks.data.splits import require_enough
from tasks.errors import DataError
from tasks.io import atomic_write, write_json
from tasks.params import AuditParams
from tasks.scoring.plots import draw_audit
from tasks.stage import Context, Progress, stage_main

COMPARED = 64
"""Side in pixels at which photos are compared, so that `twin_rms` means one thing."""

IMBALANCE = 3.0
"""Largest class over smallest from which the audit warns."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Looks:
    """What the audit keeps of each photo's pixels.

    Args:
        pictures: uint8, (n, 64, 64, 3).
        hashes: uint64, (n,); perceptual hash of each picture.
        mirrored: uint64, (n,); perceptual hash of its mirror image.
        digests: SHA-256 of shape and pixels at full size.
        sizes: int64, (n, 2); height and width in pixels.
    """

    pictures: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    mirrored: NDArray[np.uint64]
    digests: tuple[bytes, ...]
    sizes: NDArray[np.int64]


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/audit.json` and `artifacts/plots/audit.png`.

    Raises:
        DataError: the same pixels under two labels, a class that is missing or too
            small to split, or a file that cannot be read.
    """
    project = context.project
    photos = find_photos(project.data)
    count_classes(photos)
    looks = look(project.data, photos, context.progress)
    report = audit(photos, looks, context.params.audit)
    with atomic_write(project.plots / "audit.png") as picture:
        draw_audit(picture, report, photos, looks.pictures, looks.sizes)
    write_json(project.audit, report)


def look(data: Path, photos: Sequence[Photo], progress: Progress) -> Looks:
    """Read every photo once and keep what the audit needs of it.

    Args:
        data: the folder the photos are in.
        photos: which to read.
        progress: told after each photo.

    Returns:
        One row for each photo; 12 KB each, whatever the photo's size.
    """
    pictures = np.empty((len(photos), COMPARED, COMPARED, 3), np.uint8)
    hashes, mirrored = np.empty((2, len(photos)), np.uint64)
    sizes = np.empty((len(photos), 2), np.int64)
    digests = []
    for row, seen in enumerate(each_photo(_look, data, photos, progress, "look at photos")):
        pictures[row], hashes[row], mirrored[row], digest, sizes[row] = seen
        digests.append(digest)
    return Looks(pictures, hashes, mirrored, tuple(digests), sizes)


def audit(photos: Sequence[Photo], looks: Looks, params: AuditParams) -> Report:
    """Judge the photos.

    Args:
        photos: as `find_photos` lists them.
        looks: one row for each photo.
        params: what makes two photos twins.

    Returns:
        The content of `audit.json`.

    Raises:
        DataError: the same pixels under two labels, or a class that is missing or too
            small to split.
    """
    counts = count_classes(photos)
    _refuse_two_labels(photos, looks.digests)
    twins = find_twins(
        looks.pictures, looks.hashes, looks.mirrored, params.hash_distance, params.twin_rms
    )
    groups = group(len(photos), twins.pairs)
    excluded = _exclude(photos, twins, groups)
    _require_enough_kept(photos, twins, excluded, official_test="test" in counts)
    smallest, largest = min(counts["train"].values()), max(counts["train"].values())
    kept = [row for row in range(len(photos)) if row not in excluded]
    pairs = _describe(photos, _telling(photos, twins, kept))
    conflicts = [pair for pair in pairs if not _same(pair, 1)]
    across = [pair for pair in pairs if not _same(pair, 0)]
    report: Report = {
        "photos": len(photos),
        "counts": counts,
        "imbalance": round(largest / smallest, 3),
        "sizes": _sizes(looks.sizes),
        "pairs": len(twins.pairs),
        "twins": pairs,
        "groups": [[photos[row].key for row in rows] for rows in _together(groups)],
        "duplicates": len(photos) - len(set(groups.tolist())),
        "conflicts": conflicts,
        "across": across,
        "excluded": [{"photo": photos[row].key, **why} for row, why in sorted(excluded.items())],
    }
    return report | {"warnings": _warn(report)}


def _look(
    picture: NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], int, int, bytes, tuple[int, int]]:
    small = resize_square(picture, COMPARED)
    height, width = picture.shape[:2]
    digest = hashlib.sha256(f"{height}x{width} ".encode() + picture.tobytes()).digest()
    turned = np.ascontiguousarray(small[:, ::-1])
    return small, perceptual_hash(small), perceptual_hash(turned), digest, (height, width)


def _refuse_two_labels(photos: Sequence[Photo], digests: Sequence[bytes]) -> None:
    same: dict[bytes, list[Photo]] = defaultdict(list)
    for photo, digest in zip(photos, digests, strict=True):
        same[digest].append(photo)
    torn = [found for found in same.values() if len({photo.label for photo in found}) > 1]
    if torn:
        named = "; ".join(" = ".join(photo.key for photo in found) for found in torn[:5])
        more = f"; and {len(torn) - 5} more" if len(torn) > 5 else ""
        raise DataError(
            f"The same picture has two labels. Received: {named}{more}. "
            "Keep each picture under its one right label."
        )


def _exclude(
    photos: Sequence[Photo], twins: Twins, groups: NDArray[np.int64]
) -> dict[int, dict[str, str]]:
    in_test = {int(groups[r]): photo.key for r, photo in enumerate(photos) if not _trains(photo)}
    excluded = {}
    for left, right in twins.pairs.tolist():
        if photos[left].label != photos[right].label:
            for row, twin in ((left, right), (right, left)):
                excluded[row] = {"reason": "twin under another label", "twin": photos[twin].key}
    for row, number in enumerate(groups.tolist()):
        if number in in_test:
            excluded[row] = {"reason": "twin in the official test", "twin": in_test[number]}
    return {row: why for row, why in excluded.items() if _trains(photos[row])}


def _require_enough_kept(
    photos: Sequence[Photo], twins: Twins, excluded: Container[int], official_test: bool
) -> None:
    kept = [row for row, photo in enumerate(photos) if _trains(photo) and row not in excluded]
    both_kept = np.isin(twins.pairs, kept).all(axis=1)
    groups = group(len(photos), twins.pairs[both_kept])
    held_out = ["val"] if official_test else ["test", "val"]
    require_enough([photos[row].label for row in kept], groups[kept], held_out)


def _telling(photos: Sequence[Photo], twins: Twins, kept: Sequence[int]) -> Twins:
    """Leave out pairs that say nothing more: in a burst each photo is the twin of all others.

    What stays are the pairs of two labels or of train and test, and of the others the
    closest that hold each group together, without a way over photos that are kept out.
    """
    left, right = twins.pairs.T
    label = np.array([photo.label for photo in photos])
    folder = np.array([photo.folder for photo in photos])
    apart = (label[left] != label[right]) | (folder[left] != folder[right])
    both_kept = np.isin(twins.pairs, kept).all(axis=1)
    # No weight may be zero, which would be no edge, and no detour shorter than a way without.
    weights = 1.0 + twins.rms + np.where(both_kept, 0.0, 1e3)
    graph = coo_array((weights, (left, right)), (len(photos), len(photos)))
    tree = coo_array(minimum_spanning_tree(graph))
    holding = np.isin(
        left * len(photos) + right, tree.row.astype(np.int64) * len(photos) + tree.col
    )
    chosen = apart | holding
    return Twins(twins.pairs[chosen], twins.distances[chosen], twins.rms[chosen])


def _trains(photo: Photo) -> bool:
    return photo.folder == "train"


def _together(groups: NDArray[np.int64]) -> list[list[int]]:
    order = np.argsort(groups, kind="stable")
    ends = [0, *(np.flatnonzero(np.diff(groups[order])) + 1).tolist(), len(order)]
    found = [order[start:stop].tolist() for start, stop in pairwise(ends) if stop - start > 1]
    return sorted(found)


def _describe(photos: Sequence[Photo], twins: Twins) -> list[dict[str, Any]]:
    return [
        {
            "photos": [photos[left].key, photos[right].key],
            "distance": int(distance),
            "rms": round(float(rms), 3),
        }
        for (left, right), distance, rms in zip(
            twins.pairs.tolist(), twins.distances, twins.rms, strict=True
        )
    ]


def _same(pair: dict[str, Any], part: int) -> bool:
    left, right = (key.split("/")[part] for key in pair["photos"])
    return bool(left == right)


def _sizes(sizes: NDArray[np.int64]) -> dict[str, Any]:
    described: dict[str, Any] = {"distinct": len(np.unique(sizes, axis=0))}
    for name, values in zip(("height", "width"), sizes.T, strict=True):
        described[name] = {
            "min": int(values.min()),
            "median": float(np.median(values)),
            "max": int(values.max()),
        }
    return described


def _warn(report: Report) -> list[str]:
    warnings = []
    if report["conflicts"]:
        warnings.append(f"{len(report['conflicts'])} pairs of near twins have two labels")
    if report["across"]:
        warnings.append(f"{len(report['across'])} pairs of twins across train and test")
    if report["imbalance"] > IMBALANCE:
        warnings.append(f"the largest class has {report['imbalance']} times the smallest's photos")
    return warnings


if __name__ == "__main__":
    stage_main(run)
