"""Which photo is in which split, and which training photos a phase sees.

Every choice is a rank by SHA-256 of the seed and a file name, so it hangs on the
photo itself and not on what else is there: new photos hardly move old ones.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.params import LABELS

TRAIN = "train"


def assign(
    names: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[int] | NDArray[np.int64],
    shares: Mapping[str, float],
    seed: int,
) -> list[str]:
    """Split photos class by class, groups of twins kept on one side.

    In each class the groups are ranked and cut in the order of `shares`; the rest is
    `train`. With test before val, a photo near a cut that moves when photos are added
    goes between test and val or val and train, hardly ever from train to test.

    Args:
        names: file name of each photo.
        labels: class of each photo; a group has one class.
        groups: group of each photo, as `tasks.data.near_duplicates.group` gives it.
        shares: share of each class for each split but train, say {"test": 0.15, "val": 0.1}.
            Met to within the size of one group, where few are twins. A burst is trained on,
            and of the others no more than twice a share of the groups is held out.
        seed: another seed gives another split.

    Returns:
        The split of each photo. Each class is in each split.

    Raises:
        DataError: a class has fewer groups than there are splits.
    """
    splits = [TRAIN] * len(names)
    for rows_of_groups in _by_class(labels, groups, tuple(shares)).values():
        ranked = sorted(rows_of_groups, key=lambda rows: _first(rows, names, seed))
        # A burst would else fill a split by itself, and hardly be trained on.
        most = min(shares.values()) * sum(len(rows) for rows in ranked)
        ranked.sort(key=lambda rows: len(rows) > max(1.0, most))
        for split, chosen in _cut(ranked, shares).items():
            for row in (row for rows in chosen for row in rows):
                splits[row] = split
    return splits


def require_enough(
    labels: Sequence[str], groups: Sequence[int] | NDArray[np.int64], held_out: Sequence[str]
) -> None:
    """Refuse photos that cannot be in every split.

    Args:
        labels: class of each photo.
        groups: group of each photo.
        held_out: the splits that are cut from the photos besides `train`.

    Raises:
        DataError: a class of `LABELS` has fewer groups than there are splits.
    """
    _by_class(labels, groups, held_out)


def subset(
    names: Sequence[str],
    labels: Sequence[str] | NDArray[np.int64],
    fraction: float,
    seed: int,
) -> NDArray[np.int64]:
    """Choose a stratified part of the training photos.

    A smaller fraction's choice lies within a larger one's, and the same fraction gives
    the same choice, so phases that ask for 10 % share their photos.

    Args:
        names: file name of each photo.
        labels: class of each photo.
        fraction: share of each class, above 0 and at most 1; at least one photo each.
        seed: another seed gives another choice.

    Returns:
        int64, (m,); chosen indices into `names`, ascending.
    """
    classes: dict[object, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        classes[label].append(row)
    chosen: list[int] = []
    for rows in classes.values():
        ranked = sorted(rows, key=lambda row: _rank("subset", seed, names[row]))
        chosen += ranked[: max(1, int(fraction * len(rows) + 0.5))]
    return np.array(sorted(chosen), dtype=np.int64)


def _by_class(
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
                f"Class {label} has too few different photos to be in each of "
                f"{', '.join([*held_out, TRAIN])}. Received: {len(found)} (twins count once). "
                f"Import at least {len(held_out) + 1 - len(found)} more."
            )
    return classes


def _first(rows: list[int], names: Sequence[str], seed: int) -> bytes:
    return _rank("split", seed, min(names[row] for row in rows))


def _rank(purpose: str, seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{purpose}/{seed}/{name}".encode()).digest()


def _cut(ranked: list[list[int]], shares: Mapping[str, float]) -> dict[str, list[list[int]]]:
    total = sum(len(rows) for rows in ranked)
    cut, start = {}, 0
    for place, (split, share) in enumerate(shares.items()):
        still_to_come = len(shares) - place
        most = len(ranked) - start - still_to_come
        most = min(most, max(1, int(2 * share * len(ranked))))
        count = min(most, max(1, _nearest(ranked[start:], share * total)))
        cut[split] = ranked[start : start + count]
        start += count
    return cut


def _nearest(ranked: list[list[int]], wanted: float) -> int:
    """How many leading groups come nearest to `wanted` photos."""
    before = 0
    for count, rows in enumerate(ranked):
        if before + len(rows) / 2 > wanted:
            return count
        before += len(rows)
    return len(ranked)
