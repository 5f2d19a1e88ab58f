"""Splits: groups stay together, and additions move nobody from training to the test."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.splits import require_enough, stratified_group_split, stratified_sample
from tasks.errors import DataError
from tasks.params import LABELS

SHARES = {"test": 0.15, "val": 0.10}
Photos = tuple[list[str], list[str], list[int]]
seeds = st.integers(0, 2**31 - 1)


def _photos(sizes: list[int]) -> Photos:
    """In each class a group of near-duplicates of each size."""
    rows = [
        (label, number * len(LABELS) + place)
        for place, label in enumerate(LABELS)
        for number, size in enumerate(sizes)
        for _ in range(size)
    ]
    names = [f"{row}.png" for row in range(len(rows))]
    return names, [label for label, _ in rows], [group for _, group in rows]


photos = st.lists(st.integers(1, 12), min_size=3, max_size=30).map(_photos)


@given(photos, seeds)
@settings(max_examples=60, deadline=None)
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
    counts = Counter(stratified_group_split(names, labels, groups, SHARES, 20))
    # Of groups of several sizes, the larger ones are mostly trained on.
    tolerance = 0.03 if sizes[0] == sizes[1] else 0.1
    assert abs(counts["test"] / len(names) - 0.15) < tolerance
    assert abs(counts["val"] / len(names) - 0.10) < tolerance
    assert min(counts["test"], counts["val"]) > 0.03 * len(names)


@given(seeds, st.sampled_from(["any", "one class", "each once"]))
@settings(max_examples=60, deadline=None)
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
    after = stratified_group_split(
        names + more, labels * 2, groups + [1000 + group for group in groups], SHARES, 20
    )
    assert after[: len(names)] == before


def test_another_seed_gives_another_split() -> None:
    photos = _photos([1] * 60)
    splits = [stratified_group_split(*photos, SHARES, seed) for seed in (1, 2)]
    assert splits[0] != splits[1]


def test_an_official_test_leaves_only_validation_to_split() -> None:
    splits = stratified_group_split(*_photos([1] * 300), {"val": 0.1}, 20)
    assert set(splits) == {"train", "val"}
    assert abs(splits.count("val") / len(splits) - 0.1) < 0.02


@pytest.mark.parametrize("held_out", [("val",), ("test", "val")])
def test_a_class_with_too_few_groups_is_named_with_what_is_missing(
    held_out: tuple[str, ...],
) -> None:
    _, labels, groups = _photos([3] * len(held_out))
    with pytest.raises(DataError, match=r"Class 0 has too few photos: .* at least 1 more"):
        require_enough(labels, groups, held_out)
    require_enough(labels + list(LABELS), groups + list(range(100, 106)), held_out)


def test_a_missing_class_is_refused() -> None:
    _, labels, groups = _photos([1] * 6)
    rows = [row for row, label in enumerate(labels) if label != "4"]
    with pytest.raises(DataError, match="Class 4"):
        require_enough([labels[r] for r in rows], [groups[r] for r in rows], ("val",))


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.floats(0.01, 1.0), seeds)
@settings(max_examples=60, deadline=None)
def test_a_smaller_sample_is_part_of_a_larger_one(
    per_class: int, one: float, other: float, seed: int
) -> None:
    names, labels, _ = _photos([1] * per_class)
    small, large = sorted((one, other))
    fewer = stratified_sample(names, labels, small, seed)
    assert {*fewer.tolist()} <= {*stratified_sample(names, labels, large, seed).tolist()}
    for label, total in Counter(labels).items():
        chosen = sum(labels[row] == label for row in fewer)
        assert chosen >= 1
        assert abs(chosen - small * total) <= max(0.5, 1 - small * total)


def test_the_whole_sample_is_everything_in_order() -> None:
    names, labels, _ = _photos([1] * 7)
    numbers = np.array([int(label) for label in labels])
    assert stratified_sample(names, numbers, 1.0, 3).tolist() == list(range(len(names)))


def test_removing_photos_keeps_most_of_a_sample() -> None:
    names, labels, _ = _photos([1] * 150)
    chosen = {names[row] for row in stratified_sample(names, labels, 0.1, 20)}
    kept = [row for row in range(len(names)) if row % 20]
    fewer, fewer_labels = [names[row] for row in kept], [labels[row] for row in kept]
    again = {fewer[row] for row in stratified_sample(fewer, fewer_labels, 0.1, 20)}
    assert len(chosen & again) >= 0.85 * len(again)
