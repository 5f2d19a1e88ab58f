"""Splits: groups stay together, and additions move nobody from training to the test."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import dataset
from tasks.data.dataset import Photo, stratified_sample
from tasks.errors import DataError
from tests.fixtures.photos import LABELS

check_trainable = partial(dataset.check_trainable, labels=LABELS)
groups_by_class = partial(dataset.groups_by_class, classes=LABELS)
split = partial(dataset.stratified_group_split, classes=LABELS)

SHARES = {"test": 0.15, "val": 0.10}
Photos = tuple[list[str], list[str], list[int]]
seeds = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=40, deadline=None)


def grouped(sizes: list[int]) -> Photos:
    """In each class a group of near-duplicates of each size; names, labels and groups."""
    rows = [
        (label, number * len(LABELS) + place)
        for place, label in enumerate(LABELS)
        for number, size in enumerate(sizes)
        for _ in range(size)
    ]
    names = [f"{row}.png" for row in range(len(rows))]
    return names, [label for label, _ in rows], [group for _, group in rows]


@given(st.lists(st.integers(1, 12), min_size=3, max_size=30).map(grouped), seeds)
@FEW
def test_every_class_is_in_every_split_and_no_group_is_divided(photos: Photos, seed: int) -> None:
    names, labels, groups = photos
    splits = split(names, labels, groups, SHARES, seed)
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
    assert set(zip(labels, splits, strict=True)) == {
        (label, one) for label in LABELS for one in ("train", "val", "test")
    }


@pytest.mark.parametrize("sizes", [[1] * 600, [10] * 200, [5, 8, 12] * 100])
def test_shares_are_met_on_average_with_and_without_bursts(sizes: list[int]) -> None:
    names, labels, groups = grouped(sizes)
    splits = split(names, labels, groups, SHARES, 20)
    counts = Counter(splits)
    # Of groups of several sizes, the larger ones are mostly trained on.
    tolerance = 0.03 if sizes[0] == sizes[1] else 0.1
    assert abs(counts["test"] / len(names) - 0.15) < tolerance
    assert abs(counts["val"] / len(names) - 0.10) < tolerance
    assert min(counts["test"], counts["val"]) > 0.03 * len(names)
    assert split(names, labels, groups, SHARES, 21) != splits
    official = split(names, labels, groups, {"val": 0.1}, 20)
    assert set(official) == {"train", "val"}
    assert abs(official.count("val") / len(names) - 0.1) < tolerance


@pytest.mark.parametrize(("share", "in_test", "in_train"), [(1e-9, 1, 8), (1 - 2e-9, 8, 1)])
def test_extreme_shares_leave_one_group_of_each_class_to_each_split(
    share: float, in_test: int, in_train: int
) -> None:
    names, labels, groups = grouped([1] * 10)
    splits = split(names, labels, groups, {"test": share, "val": 1e-9}, 20)
    counts = Counter(zip(labels, splits, strict=True))
    expected = {"test": in_test, "val": 1, "train": in_train}
    assert counts == {(label, name): n for label in LABELS for name, n in expected.items()}


@given(seeds, st.sampled_from(["any", "one class", "each once"]))
@FEW
def test_nobody_who_was_trained_on_is_tested_after_150_copies_were_added(
    seed: int, where: str
) -> None:
    names, labels, groups = grouped([1] * 180)
    random = np.random.default_rng(seed)
    chosen = {
        "any": lambda: random.integers(0, 1080, 150),
        "one class": lambda: random.integers(180, 360, 150),
        "each once": lambda: random.permutation(180)[:150],
    }[where]()
    copies = [f"{random.integers(2**62):016x}.jpg" for _ in chosen]
    before = split(names, labels, groups, SHARES, seed)
    more_labels, more_groups = ([of[row] for row in chosen] for of in (labels, groups))
    after = split(names + copies, labels + more_labels, groups + more_groups, SHARES, seed)
    moves = Counter(zip(before, after[:1080], strict=True))
    assert moves["train", "test"] == moves["train", "val"] == moves["val", "test"] == 0
    # Photos that are no copies move no old one.
    new = [2000 + group for group in groups]
    names += [f"new-{name}" for name in names]
    assert split(names, labels * 2, groups + new, SHARES, seed)[:1080] == before


@pytest.mark.parametrize(("official", "needed"), [(True, 2), (False, 3)])
def test_classes_with_too_few_groups_are_named_with_what_they_have(
    official: bool, needed: int
) -> None:
    photos = [Photo("train", label, str(n)) for label in LABELS for n in range(needed)]
    photos += [Photo("test", label, "x") for label in LABELS if official]
    check_trainable(photos)
    with pytest.raises(DataError, match=rf"needs {needed} or more.*: 0 \({needed - 1}\)\. "):
        check_trainable(photos[1:])
    held_out = ["val"] if official else ["test", "val"]
    _, labels, groups = grouped([3] * (needed - 1))
    few = rf"needs {needed} or more, .*: 0 \({needed - 1}\), 1 \({needed - 1}\)"
    with pytest.raises(DataError, match=few):
        groups_by_class(labels, groups, held_out)
    enough = groups_by_class(labels + list(LABELS), groups + list(range(100, 106)), held_out)
    assert [len(found) for found in enough.values()] == [needed] * 6
    with pytest.raises(DataError, match=r"have fewer: 4 \(0\)\. Import"):
        groups_by_class([label for label in LABELS * 3 if label != "4"], range(15), held_out)


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.floats(0.01, 1.0), seeds)
@FEW
def test_a_smaller_sample_is_part_of_a_larger_one(
    per_class: int, one: float, other: float, seed: int
) -> None:
    names, labels, _ = grouped([1] * per_class)
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
