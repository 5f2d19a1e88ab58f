"""Splits: groups stay together, and additions move nobody from training to the test."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.dataset import (
    Photo,
    stratified_sample,
)
from tasks.data.dataset import (
    check_trainable as check_trainable_,
)
from tasks.data.dataset import (
    groups_by_class as groups_by_class_,
)
from tasks.data.dataset import (
    stratified_group_split as stratified_group_split_,
)
from tasks.errors import DataError
from tests.fixtures.photos import LABELS

check_trainable = partial(check_trainable_, labels=LABELS)

groups_by_class = partial(groups_by_class_, classes=LABELS)

stratified_group_split = partial(stratified_group_split_, classes=LABELS)

SHARES = {"test": 0.15, "val": 0.10}
Photos = tuple[list[str], list[str], list[int]]
seeds = st.integers(0, 2**31 - 1)


def _photos(sizes: list[int]) -> Photos:
    """In each class a group of near-duplicates of each size; names, labels and groups."""
    rows = [
        (label, number * len(LABELS) + place)
        for place, label in enumerate(LABELS)
        for number, size in enumerate(sizes)
        for _ in range(size)
    ]
    names = [f"{row}.png" for row in range(len(rows))]
    return names, [label for label, _ in rows], [group for _, group in rows]


@given(st.lists(st.integers(1, 12), min_size=3, max_size=30).map(_photos), seeds)
@settings(max_examples=40, deadline=None)
def test_every_class_is_in_every_split_and_no_group_is_divided(photos: Photos, seed: int) -> None:
    names, labels, groups = photos
    splits = stratified_group_split(names, labels, groups, SHARES, seed)
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
    assert set(zip(labels, splits, strict=True)) == {
        (label, split) for label in LABELS for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("sizes", [[1] * 600, [10] * 200, [5, 8, 12] * 100])
def test_shares_are_met_on_average_with_and_without_bursts(sizes: list[int]) -> None:
    names, labels, groups = _photos(sizes)
    splits = stratified_group_split(names, labels, groups, SHARES, 20)
    counts = Counter(splits)
    # Of groups of several sizes, the larger ones are mostly trained on.
    tolerance = 0.03 if sizes[0] == sizes[1] else 0.1
    assert abs(counts["test"] / len(names) - 0.15) < tolerance
    assert abs(counts["val"] / len(names) - 0.10) < tolerance
    assert min(counts["test"], counts["val"]) > 0.03 * len(names)
    assert stratified_group_split(names, labels, groups, SHARES, 21) != splits
    official = stratified_group_split(names, labels, groups, {"val": 0.1}, 20)
    assert set(official) == {"train", "val"}
    assert abs(official.count("val") / len(names) - 0.1) < tolerance


@pytest.mark.parametrize(("share", "in_test", "in_train"), [(1e-9, 1, 8), (1 - 2e-9, 8, 1)])
def test_extreme_shares_leave_one_group_of_each_class_to_each_split(
    share: float, in_test: int, in_train: int
) -> None:
    names, labels, groups = _photos([1] * 10)
    splits = stratified_group_split(names, labels, groups, {"test": share, "val": 1e-9}, 20)
    counts = Counter(zip(labels, splits, strict=True))
    expected = {"test": in_test, "val": 1, "train": in_train}
    assert counts == {(label, name): n for label in LABELS for name, n in expected.items()}


@given(seeds, st.sampled_from(["any", "one class", "each once"]))
@settings(max_examples=40, deadline=None)
def test_nobody_who_was_trained_on_is_tested_after_150_copies_were_added(
    seed: int, where: str
) -> None:
    names, labels, groups = _photos([1] * 180)
    random = np.random.default_rng(seed)
    chosen = {
        "any": lambda: random.integers(0, 1080, 150),
        "one class": lambda: random.integers(180, 360, 150),
        "each once": lambda: random.permutation(180)[:150],
    }[where]()
    copies = [f"{random.integers(2**62):016x}.jpg" for _ in chosen]
    before = stratified_group_split(names, labels, groups, SHARES, seed)
    after = stratified_group_split(
        names + copies,
        labels + [labels[row] for row in chosen],
        groups + [groups[row] for row in chosen],
        SHARES,
        seed,
    )
    moves = Counter(zip(before, after[:1080], strict=True))
    assert moves["train", "test"] == moves["train", "val"] == moves["val", "test"] == 0


def test_new_photos_move_no_old_one() -> None:
    names, labels, groups = _photos([1] * 150)
    before = stratified_group_split(names, labels, groups, SHARES, 20)
    more = [f"new-{name}" for name in names]
    more_groups = [1000 + group for group in groups]
    after = stratified_group_split(names + more, labels * 2, groups + more_groups, SHARES, 20)
    assert after[: len(names)] == before


@pytest.mark.parametrize("held_out", [("val",), ("test", "val")])
def test_classes_with_too_few_groups_are_named_with_what_they_have(
    held_out: tuple[str, ...],
) -> None:
    _, labels, groups = _photos([3] * len(held_out))
    few = len(held_out)
    with pytest.raises(DataError, match=rf"needs {few + 1} or more, .*: 0 \({few}\), 1 \({few}\)"):
        groups_by_class(labels, groups, held_out)
    enough = groups_by_class(labels + list(LABELS), groups + list(range(100, 106)), held_out)
    assert [len(found) for found in enough.values()] == [few + 1] * 6
    rows = [row for row, label in enumerate(labels * 3) if label != "4"]
    with pytest.raises(DataError, match=r"have fewer: 4 \(0\)\. Import"):
        groups_by_class([(labels * 3)[row] for row in rows], rows, held_out)


@pytest.mark.parametrize(("official", "needed"), [(True, 2), (False, 3)])
def test_photos_are_trainable_if_each_class_can_be_in_each_split(
    official: bool, needed: int
) -> None:
    photos = [Photo("train", label, str(n)) for label in LABELS for n in range(needed)]
    photos += [Photo("test", label, "x") for label in LABELS if official]
    check_trainable(photos)
    with pytest.raises(DataError, match=rf"needs {needed} or more.*: 0 \({needed - 1}\)\. "):
        check_trainable(photos[1:])


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.floats(0.01, 1.0), seeds)
@settings(max_examples=40, deadline=None)
def test_a_smaller_sample_is_part_of_a_larger_one(
    per_class: int, one: float, other: float, seed: int
) -> None:
    names, labels, _ = _photos([1] * per_class)
    small, large = sorted((one, other))
    fewer = stratified_sample(names, labels, small, seed).tolist()
    assert fewer == sorted(fewer)
    assert {*fewer} <= {*stratified_sample(names, labels, large, seed).tolist()}
    for label, total in Counter(labels).items():
        chosen = sum(labels[row] == label for row in fewer)
        assert chosen >= 1
        assert abs(chosen - small * total) <= max(0.5, 1 - small * total)
    numbers = np.array([int(label) for label in labels])
    assert stratified_sample(names, numbers, 1.0, seed).tolist() == list(range(len(names)))


def test_removing_photos_keeps_most_of_a_sample() -> None:
    names, labels, _ = _photos([1] * 150)
    chosen = {names[row] for row in stratified_sample(names, labels, 0.1, 20)}
    kept = [row for row in range(len(names)) if row % 20]
    fewer, fewer_labels = [names[row] for row in kept], [labels[row] for row in kept]
    again = {fewer[row] for row in stratified_sample(fewer, fewer_labels, 0.1, 20)}
    assert len(chosen & again) >= 0.85 * len(again)
