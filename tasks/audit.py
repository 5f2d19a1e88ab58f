"""Stage: find near-duplicate photos, such as bursts and mirror images.

With two labels both are excluded, as labelling errors; so is a training photo that is a
near-duplicate of an official test photo. The test itself never changes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tasks.data.dataset import Photo, count_classes, find_photos, groups_by_class
from tasks.data.images import Pixels, each_photo, perceptual_hash, resize_square
from tasks.errors import DataError
from tasks.io import atomic_write, write_json
from tasks.params import AuditParams
from tasks.stage import Context, Progress

COMPARED = 64  # side in pixels at which photos are compared
REPRESENTATIVES = 64
"""A photo with this many near-duplicates of its own kind is not compared with later ones."""
BLOCK = 256  # photos that are compared with all others at a time
GRID = 4
ROUNDING = 0.01  # of the sums below, as a root-mean-square difference
CLOSEST = 100  # pairs in the report beside those of two labels, and those of train and test
SAMPLES, MAX_CLASSES, GAP = 12, 40, 3
"""Of the picture: photos of a class and pairs, classes, and pixels between photos."""

Rows = NDArray[np.int64]
Report = dict[str, Any]


@dataclass(frozen=True)
class ImageStats:
    """What the audit keeps of each photo: 12 KB, whatever its size."""

    pictures: NDArray[np.uint8]  # (n, side, side, 3), the side a multiple of 4
    hashes: NDArray[np.uint64]  # perceptual hash of each picture
    mirrored: NDArray[np.uint64]  # that of its mirror image


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs, sorted by row: all, or of more than `REPRESENTATIVES` enough to join the groups."""

    pairs: Rows  # (m, 2)
    rms: NDArray[np.float64]  # (m,); root-mean-square difference of the pixels, 0 to 255
    representatives: Rows  # (n,); the row itself, or the one that was compared instead

    @property
    def groups(self) -> Rows:
        """The group of each row: near-duplicates, and their near-duplicates."""
        count = len(self.representatives)
        graph = coo_array((np.ones(len(self.pairs), bool), self.pairs.T), (count, count))
        return np.asarray(connected_components(graph)[1], np.int64)


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/audit.json` and `artifacts/plots/audit.png`."""
    project = context.project
    photos = find_photos(project.data)
    count_classes(photos, context.params.labels)  # before the photos are read
    stats = measure(project.data, photos, context.progress)
    report = audit(photos, stats, context.params.audit, context.params.labels)
    with atomic_write(project.plots / "audit.png") as temporary:
        sheet = draw_audit(report, photos, stats.pictures)
        Image.fromarray(sheet).save(temporary, format="PNG")
    write_json(project.audit, report)


def measure(data: Path, photos: Sequence[Photo], progress: Progress) -> ImageStats:
    """Decode every photo once; row i belongs to photo i."""

    def measured(picture: Pixels) -> tuple[Pixels, int, int]:
        small = resize_square(picture, COMPARED)
        return small, perceptual_hash(small), perceptual_hash(np.fliplr(small))

    pictures = np.empty((len(photos), COMPARED, COMPARED, 3), np.uint8)
    hashes, mirrored = np.empty((2, len(photos)), np.uint64)
    paths = [data / photo.key for photo in photos]
    for row, stats in enumerate(each_photo(measured, paths, progress, "audit photos")):
        pictures[row], hashes[row], mirrored[row] = stats
    return ImageStats(pictures, hashes, mirrored)


def audit(
    photos: Sequence[Photo], stats: ImageStats, params: AuditParams, classes: Sequence[str]
) -> Report:
    counts = count_classes(photos, classes)
    folders = np.array([photo.folder for photo in photos])
    labels, label_ids = np.unique([photo.label for photo in photos], return_inverse=True)
    found = find_near_duplicates(stats, label_ids + len(labels) * (folders == "test"), params)
    left, right = found.pairs.T
    conflicts = label_ids[left] != label_ids[right]
    across = folders[left] != folders[right]

    def describe(rows: Rows) -> list[dict[str, Any]]:
        return [
            {"photos": [photos[row].key for row in pair], "rms": round(rms, 3)}
            for pair, rms in zip(found.pairs[rows].tolist(), found.rms[rows].tolist(), strict=True)
        ]

    if same := describe(np.flatnonzero(conflicts & (found.rms == 0))):
        named = "; ".join(" = ".join(pair["photos"]) for pair in same[:5])
        more = f"; and {len(same) - 5} more" if same[5:] else ""
        raise DataError(
            f"The same picture has two labels: {named}{more}. Keep each picture only under its "
            "right label."
        )
    excluded = _exclude(photos, found, found.pairs[conflicts])
    # Photos of two labels in one group are near-duplicates of excluded photos only.
    groups = found.groups * len(labels) + label_ids
    members: dict[int, list[str]] = defaultdict(list)
    for photo, number in zip(photos, groups.tolist(), strict=True):
        members[number].append(photo.key)
    kept = [r for r, photo in enumerate(photos) if photo.folder == "train" and r not in excluded]
    held_out = ["val"] if "test" in counts else ["test", "val"]
    groups_by_class([photos[row].label for row in kept], groups[kept], held_out, classes)
    warnings = [
        (conflicts.any(), f"{conflicts.sum()} pairs of near-duplicates have two labels"),
        (across.any(), f"{across.sum()} pairs of near-duplicates across train and test"),
    ]
    return {
        "photos": len(photos),
        "counts": counts,
        "groups": [keys for keys in members.values() if len(keys) > 1],
        "duplicates": len(photos) - len(np.unique(found.groups)),
        "conflicts": describe(np.flatnonzero(conflicts)),
        "across": describe(np.flatnonzero(across)),
        "closest": describe(np.argsort(found.rms, kind="stable")[:CLOSEST]),
        "excluded": [{"photo": photos[row].key, **why} for row, why in sorted(excluded.items())],
        "warnings": [warning for applies, warning in warnings if applies],
    }


def _exclude(
    photos: Sequence[Photo], found: NearDuplicates, conflicting: Rows
) -> dict[int, dict[str, str]]:
    """Reason and near-duplicate of each training photo that must not be trained on."""
    conflicts = {row: other for pair in conflicting.tolist() for row, other in (pair, pair[::-1])}
    groups = found.groups.tolist()
    in_test = {groups[r]: photo.key for r, photo in enumerate(photos) if photo.folder == "test"}
    excluded = {}
    for row, representative in enumerate(found.representatives.tolist()):
        other = conflicts.get(row, conflicts.get(representative))
        if photos[row].folder != "train":
            continue
        if tested := in_test.get(groups[row]):
            excluded[row] = {"reason": "near-duplicate in the official test", "of": tested}
        elif other is not None:
            reason = "near-duplicate with another label"
            excluded[row] = {"reason": reason, "of": photos[other].key}
    return excluded


def find_near_duplicates(stats: ImageStats, kinds: Rows, params: AuditParams) -> NearDuplicates:
    """Find pairs whose hashes and pixels are close, as they are or mirrored.

    Each photo is compared with representatives that are about as bright: the difference of two
    pictures is at least that of their brightness, and that of their coarse colors. A photo is
    only represented by one of its kind; `kinds` is (n,).
    """
    pictures, hashes, mirrored = stats.pictures, stats.hashes, stats.mirrored
    count, side = pictures.shape[:2]
    # Mean colors of the cells of a grid and of their mirror images, (n, 24).
    means = pictures.reshape(count, GRID, side // GRID, GRID, side // GRID, 3).mean(axis=(2, 4))
    half = np.mean([means, means[:, :, ::-1]], axis=0)[:, :, : GRID // 2]
    colors = half.reshape(count, 6 * GRID)
    brightness = colors.mean(axis=1)
    order = np.argsort(brightness, kind="stable")
    squares, reach = np.square(colors).sum(axis=1), params.max_rms_difference + ROUNDING
    closest: dict[tuple[int, int], float] = {}
    represented_by = np.arange(len(pictures))
    active = np.empty(0, np.int64)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        active = active[brightness[active] >= brightness[block[0]] - reach]
        others = np.concatenate([active, block])
        # |a - b|^2, as one matrix product; only with those before a row.
        product = colors[block] @ colors[others].T
        apart = squares[block, None] + squares[others] - product - product
        near = apart <= colors.shape[1] * reach * reach
        rows, columns = np.nonzero(np.tril(near, k=len(active) - 1))
        left, right = block[rows], others[columns]
        plain = np.bitwise_count(hashes[left] ^ hashes[right])
        turned = np.minimum(
            np.bitwise_count(hashes[left] ^ mirrored[right]),
            np.bitwise_count(mirrored[left] ^ hashes[right]),
        )
        found: dict[int, dict[int, float]] = {row: {} for row in block.tolist()}
        for step, bits in ((1, plain), (-1, turned)):
            close = bits <= params.max_hash_distance
            for row, other in zip(left[close].tolist(), right[close].tolist(), strict=True):
                like = np.ascontiguousarray(pictures[other][:, ::step])
                square = cv2.norm(pictures[row], like, cv2.NORM_L2SQR)
                rms = float(np.sqrt(square / like.size))
                if rms <= params.max_rms_difference:
                    # A picture that is its own mirror image is found twice.
                    found[row][other] = min(rms, found[row].get(other, rms))
        for row, pairs in found.items():
            kept = {other: rms for other, rms in pairs.items() if represented_by[other] == other}
            closest |= {(min(row, other), max(row, other)): rms for other, rms in kept.items()}
            same = [(rms, other) for other, rms in kept.items() if kinds[other] == kinds[row]]
            if len(same) >= REPRESENTATIVES:
                represented_by[row] = min(same)[1]
        active = np.concatenate([active, block[represented_by[block] == block]])
    ordered = sorted(closest)
    return NearDuplicates(
        pairs=np.array(ordered, np.int64).reshape(len(ordered), 2),
        rms=np.array([closest[pair] for pair in ordered]),
        representatives=represented_by,
    )


def draw_audit(
    report: dict[str, Any], photos: Sequence[Photo], pictures: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Show samples of each class, one class a row, and near-duplicate pairs below."""
    shown = []
    for label in [*report["counts"]["train"]][:MAX_CLASSES]:
        rows = [row for row, photo in enumerate(photos) if photo.label == label]
        shown += [pictures[rows[n * len(rows) // SAMPLES]] for n in range(SAMPLES)]
    described = [*report["conflicts"], *report["across"], *report["closest"]]
    pairs = list(dict.fromkeys(tuple(pair["photos"]) for pair in described))[:SAMPLES]
    row_of = {photo.key: row for row, photo in enumerate(photos)}
    shown += [np.full((COMPARED, COMPARED, 3), 255, np.uint8)] * SAMPLES if pairs else []
    shown += [pictures[row_of[key]] for pair in pairs for key in pair]
    side, count = COMPARED + GAP, -(-len(shown) // SAMPLES)
    sheet = np.full((count * side - GAP, SAMPLES * side - GAP, 3), 255, np.uint8)
    for number, picture in enumerate(shown):
        top, left = (place * side for place in divmod(number, SAMPLES))
        sheet[top : top + side - GAP, left : left + side - GAP] = picture
    return sheet
