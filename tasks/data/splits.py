"""Splits of the photos, and the part of the training split that a phase uses.

Every choice depends on a SHA-256 of the seed and a photo's name, and not on which other
photos there are, so that photos that are added hardly change it.
"""

import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.params import LABELS

TRAIN = "train"
_SMALL_GROUPS = 0.1
"""Quantile of the group sizes that the limits of the split are computed for."""


def stratified_group_split(
    names: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[int] | NDArray[np.int64],
    shares: Mapping[str, float],
    seed: int,
) -> list[str]:
    """Hash-based split of each class, with each group in one split.

    The rank of a group is the highest rank of its photos, and the lowest ranks are held
    out. A photo that is added can only raise the rank of its group, so it moves no photo
    from training to the test. Hence large groups are mostly trained on. If nearly all
    groups have m photos or more, the limits take it into account that all m ranks lie
    below a limit with probability limit**m.

    Args:
        names: unique name of each photo.
        labels: class of each photo; the photos of a group have one class.
        groups: group of each photo.
        shares: share of each split but `train`, the test first; met on average.

    Returns:
        The split of each photo. Every class is in every split.

    Raises:
        DataError: a class has fewer groups than there are splits.
    """
    splits = [TRAIN] * len(names)
    classes = _groups_by_class(labels, groups, tuple(shares))
    sizes = [len(rows) for found in classes.values() for rows in found]
    size = np.quantile(sizes, _SMALL_GROUPS, method="lower")
    for found in classes.values():
        ranked = sorted((max(_rank(seed, names[row]) for row in rows), rows) for rows in found)
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


def require_enough(
    labels: Sequence[str], groups: Sequence[int] | NDArray[np.int64], held_out: Sequence[str]
) -> None:
    """Raise `DataError` if a class has fewer groups than there are splits."""
    _groups_by_class(labels, groups, held_out)


def stratified_sample(
    names: Sequence[str],
    labels: Sequence[str] | NDArray[np.int64],
    fraction: float,
    seed: int,
) -> NDArray[np.int64]:
    """Row numbers of a share of each class, ascending, and at least one of each class.

    The sample of a smaller fraction is part of that of a larger one.
    """
    classes: dict[object, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        classes[label].append(row)
    chosen: list[int] = []
    for rows in classes.values():
        ranked = sorted(rows, key=lambda row: _digest("subset", seed, names[row]))
        chosen += ranked[: max(1, int(fraction * len(rows) + 0.5))]
    return np.array(sorted(chosen), dtype=np.int64)


def _groups_by_class(
    labels: Sequence[str], groups: Sequence[int] | NDArray[np.int64], held_out: Sequence[str]
) -> dict[str, list[list[int]]]:
    members: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(groups):
        members[int(number)].append(row)
    classes: dict[str, list[list[int]]] = {label: [] for label in LABELS}
    for rows in members.values():
        classes[labels[rows[0]]].append(rows)
    for label, found in classes.items():
        if len(found) <= len(held_out):
            raise DataError(
                f"Class {label} has too few photos: {len(found)} (near-duplicates count once) "
                f"cannot be in each of {', '.join([*held_out, TRAIN])}. "
                f"Import at least {len(held_out) + 1 - len(found)} more."
            )
    return classes


def _rank(seed: int, name: str) -> float:
    """Pseudo-random number in [0, 1)."""
    return int.from_bytes(_digest("split", seed, name)[:6]) / 2**48


def _digest(purpose: str, seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{purpose}/{seed}/{name}".encode()).digest()
