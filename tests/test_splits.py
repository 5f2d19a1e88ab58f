"""The split: complete, leak-free, near the wanted shares, and stable as photos come."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.splits import assign, require_enough, subset
from tasks.errors import DataError
from tasks.params import LABELS

SHARES = {"test": 0.15, "val": 0.10}

Photos = tuple[list[str], list[str], list[int]]


@st.composite
def photo_sets(draw: st.DrawFn) -> Photos:
    """Names, labels and groups: at least three groups a class, of one to five photos."""
    names: list[str] = []
    labels: list[str] = []
    groups: list[int] = []
    prefix = draw(st.integers(0, 10**6))
    for label in LABELS:
        for size in draw(st.lists(st.integers(1, 5), min_size=3, max_size=25)):
            number = (groups[-1] + 1) if groups else 0
            for _ in range(size):
                names.append(f"{prefix}-{len(names):05d}.png")
                labels.append(label)
                groups.append(number)
    return names, labels, groups


held_out = st.floats(0.01, 0.49)
seeds = st.integers(0, 2**31 - 1)


@given(photo_sets(), held_out, held_out, seeds)
@settings(max_examples=60, deadline=None)
def test_every_split_has_each_class_and_twins_stay_together(
    photos: Photos, test: float, val: float, seed: int
) -> None:
    names, labels, groups = photos
    splits = assign(names, labels, groups, {"test": test, "val": val}, seed)
    assert len(splits) == len(names)
    assert {*zip(labels, splits, strict=True)} == {
        (label, split) for label in LABELS for split in ("train", "val", "test")
    }
    assert len({*zip(groups, splits, strict=True)}) == len({*groups})


@given(photo_sets(), held_out, held_out, seeds)
@settings(max_examples=60, deadline=None)
def test_shares_are_met_to_within_one_group(
    photos: Photos, test: float, val: float, seed: int
) -> None:
    names, labels, groups = photos
    shares = {"test": test, "val": val}
    splits = assign(names, labels, groups, shares, seed)
    counts = Counter(zip(labels, splits, strict=True))
    largest = Counter(groups)
    for label in LABELS:
        total = labels.count(label)
        biggest = max(largest[g] for g, own in zip(groups, labels, strict=True) if own == label)
        if total - total * (test + val) < 2 * biggest:
            continue  # so few groups that one each comes before the shares
        for split, share in shares.items():
            assert abs(counts[label, split] - share * total) <= biggest


@given(photo_sets(), seeds)
@settings(max_examples=30, deadline=None)
def test_the_split_hangs_on_the_seed_and_not_on_the_order(photos: Photos, seed: int) -> None:
    names, labels, groups = photos
    splits = assign(names, labels, groups, SHARES, seed)
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    shuffled = assign(
        [names[k] for k in order],
        [labels[k] for k in order],
        [groups[k] for k in order],
        SHARES,
        seed,
    )
    assert shuffled == [splits[k] for k in order]


def test_another_seed_gives_another_split() -> None:
    names, labels, groups = _single(40)
    assert assign(names, labels, groups, SHARES, 1) != assign(names, labels, groups, SHARES, 2)


@given(st.integers(100, 200), seeds, seeds)
@settings(max_examples=25, deadline=None)
def test_five_per_cent_new_photos_move_few_old_ones(per_class: int, seed: int, run: int) -> None:
    names, labels, groups = _single(per_class, run)
    before = assign(names, labels, groups, SHARES, seed)
    more, more_labels, _ = _single(per_class // 20, run + 1)
    every = range(len(names) + len(more))
    after = assign(names + more, labels + more_labels, list(every), SHARES, seed)
    changed = list(zip(before, after[: len(names)], strict=True))
    moved = sum(old != new for old, new in changed)
    assert moved <= 0.04 * len(names)
    assert changed.count(("train", "test")) + changed.count(("test", "train")) == 0


@given(st.integers(30, 300), st.integers(6, 40), seeds)
@settings(max_examples=60, deadline=None)
def test_a_burst_is_trained_on_and_not_alone(burst: int, singles: int, seed: int) -> None:
    names, labels, groups = [], [], []
    for label in LABELS:
        for number in range(burst + singles):
            names.append(f"{label}-{number}")
            labels.append(label)
            groups.append(1000 * int(label) + max(0, number - burst + 1))
    splits = assign(names, labels, groups, SHARES, seed)
    for label in LABELS:
        counts = Counter(s for s, own in zip(splits, labels, strict=True) if own == label)
        assert counts["train"] > burst
        assert counts["test"] + counts["val"] <= singles * 0.75


def test_an_official_test_leaves_only_val_to_cut() -> None:
    names, labels, groups = _single(20)
    splits = assign(names, labels, groups, {"val": 0.10}, 5)
    assert Counter(splits) == {"train": 18 * 6, "val": 2 * 6}


def test_a_class_with_too_few_groups_is_refused_by_name() -> None:
    names, labels, groups = _single(5)
    rows = [row for row, label in enumerate(labels) if label == "4"]
    for row in rows[1:]:
        groups[row] = groups[rows[-1]]
    with pytest.raises(DataError, match=r"Class 4 .* Received: 2 .* at least 1 more"):
        assign(names, labels, groups, SHARES, 0)
    require_enough(labels, groups, ["val"])


def test_a_missing_class_is_refused() -> None:
    _, labels, groups = _single(5)
    kept = [row for row, label in enumerate(labels) if label != "2"]
    with pytest.raises(DataError, match="Class 2"):
        require_enough([labels[k] for k in kept], [groups[k] for k in kept], ["test", "val"])


@given(photo_sets(), st.floats(0.01, 1.0), st.floats(0.01, 1.0), seeds)
@settings(max_examples=60, deadline=None)
def test_a_smaller_subset_lies_within_a_larger_one(
    photos: Photos, one: float, other: float, seed: int
) -> None:
    names, labels, _ = photos
    small, large = sorted((one, other))
    fewer = subset(names, labels, small, seed)
    assert {*fewer.tolist()} <= {*subset(names, labels, large, seed).tolist()}
    for label, total in Counter(labels).items():
        chosen = sum(labels[row] == label for row in fewer)
        assert chosen >= 1
        assert abs(chosen - small * total) <= max(0.5, 1 - small * total)


def test_the_whole_subset_is_everything_in_order() -> None:
    names, labels, _ = _single(7)
    assert subset(names, np.array([int(label) for label in labels]), 1.0, 3).tolist() == list(
        range(len(names))
    )


def test_removing_photos_keeps_most_of_a_subset() -> None:
    names, labels, _ = _single(150)
    chosen = {names[row] for row in subset(names, labels, 0.1, 20)}
    kept = [row for row in range(len(names)) if row % 20]
    fewer, fewer_labels = [names[row] for row in kept], [labels[row] for row in kept]
    again = {fewer[row] for row in subset(fewer, fewer_labels, 0.1, 20)}
    assert len(chosen & again) >= 0.85 * len(again)


def _single(per_class: int, run: int = 0) -> Photos:
    """`per_class` photos of each class, no twins."""
    labels = [label for label in LABELS for _ in range(per_class)]
    names = [f"{run}-{row}.png" for row in range(len(labels))]
    return names, labels, list(range(len(labels)))
