"""The dataset: what is stored, at what size, and in which split.

Groups of near-duplicates stay together, and additions move nobody from training to the test.
"""

import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import audit, preprocess, synthetic
from tasks.data.dataset import (
    Photo,
    check_trainable,
    open_dataset,
    stratified_group_split,
    stratified_sample,
)
from tasks.data.images import resize
from tasks.errors import DataError
from tasks.io import read_json, write_json
from tasks.params import Params
from tasks.project import Project
from tasks.rendering.scene import draw
from tasks.stage import Context
from tasks.training.plan import training_rows
from tests.fixtures.models import changed
from tests.fixtures.photos import LABELS, photo, write_photos

split = partial(stratified_group_split, classes=LABELS)

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
    assert len(set(zip(labels, splits, strict=True))) == 3 * len(LABELS)


def test_shares_are_met_on_average_with_and_without_bursts() -> None:
    # Of groups of several sizes, the larger ones are mostly trained on.
    for sizes, tolerance in (([1] * 600, 0.03), ([10] * 200, 0.03), ([5, 8, 12] * 100, 0.1)):
        names, labels, groups = grouped(sizes)
        splits = split(names, labels, groups, SHARES, 20)
        for name, share in SHARES.items():
            assert splits.count(name) / len(names) == pytest.approx(share, abs=tolerance)
            assert splits.count(name) > 0.03 * len(names)
        assert split(names, labels, groups, SHARES, 21) != splits
    names, labels, groups = grouped([1] * 10)
    for share, in_test in ((1e-9, 1), (1 - 2e-9, 8)):  # one group is left to each split
        counts = Counter(split(names, labels, groups, {"test": share, "val": 1e-9}, 20))
        assert counts == {"test": in_test * 6, "val": 6, "train": (9 - in_test) * 6}


@given(seeds, st.booleans())
@FEW
def test_150_added_copies_test_nobody_who_was_trained_on(seed: int, one_class: bool) -> None:
    names, labels, groups = grouped([1] * 180)
    random = np.random.default_rng(seed)
    chosen = random.integers(180, 360, 150) if one_class else random.permutation(1080)[:150]
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


def test_a_class_with_too_few_photos_is_named() -> None:
    for official, needed in ((True, 2), (False, 3)):
        photos = [Photo("train", label, str(n)) for label in LABELS for n in range(needed)]
        photos += [Photo("test", label, "x") for label in LABELS if official]
        check_trainable(photos, LABELS)
        with pytest.raises(DataError, match=rf"needs {needed} or more.*: 0 \({needed - 1}\)\. "):
            check_trainable(photos[1:], LABELS)


def test_a_sample_has_its_share_of_each_class_and_is_part_of_a_larger_one() -> None:
    names, labels, _ = grouped([1] * 10)
    smaller: set[int] = set()
    for share, each in ((0.01, 1), (0.24, 2), (0.26, 3), (0.5, 5), (1.0, 10)):
        chosen = stratified_sample(names, labels, share, 20).tolist()
        assert chosen == sorted(chosen)
        assert Counter(labels[row] for row in chosen) == dict.fromkeys(LABELS, each)
        assert smaller <= {*chosen}
        smaller = {*chosen}


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """Eight audited photos of each class, one of them with a near-duplicate, `near.png`."""
    project = Project(tmp_path)
    folder = write_photos(project.data / "train", 8)
    shutil.copy(folder / "1/0004.png", folder / "1/near.png")
    context = Context(project, params)
    audit.run(context)
    return context


def stored(context: Context) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in context.project.dataset.iterdir()}


def test_every_photo_and_synthetic_hand_is_one_row(context: Context) -> None:
    preprocess.run(context)
    first, photos = stored(context), open_dataset(context.project.dataset)
    preprocess.run(context)
    assert stored(context) == first
    assert photos.images.shape == (49, 64, 64, 3)
    order = list(zip(photos.splits, photos.labels.tolist(), photos.names, strict=True))
    assert order == sorted(order)
    index = read_json(context.project.dataset_index)
    assert index["counts"] == {one: len(photos.rows(one)) for one in ("train", "val", "test")}
    assert index["leaks"] == 0
    split_of = dict(zip(photos.names, photos.splits, strict=True))
    assert split_of["near.png"] == split_of["train/1/0004.png"]
    assert len(split_of) == 49
    for row in (0, 20, 48):
        name = photos.names[row]
        # Names that stand in several classes are paths; only one photo is called near.png.
        path = context.project.data / ("train/1/near.png" if name == "near.png" else name)
        assert path.parent.name == LABELS[photos.labels[row]]
        assert (photos.images[row] == np.asarray(Image.open(path))).all()

    both = changed(context, "synthetic", per_class=3)
    synthetic.run(both)
    preprocess.run(both)
    dataset = open_dataset(context.project.dataset)
    assert read_json(context.project.dataset_index) == index | {"synthetic": 3}
    assert dataset.splits == (*photos.splits, *["synthetic"] * 18)
    hands = dataset.rows("synthetic")
    assert dataset.labels[hands].tolist() == [n // 3 for n in range(18)]
    assert np.array_equal(dataset.images[:49], photos.images)
    fifth = draw((synthetic.FIRST_SEED + both.params.seed, 1, 1))
    assert np.array_equal(dataset.images[hands[4]], fifth)
    assert {*training_rows(dataset, 1.0, seed=1)} == {*dataset.rows("train"), *hands}


def test_near_duplicates_of_an_official_test_are_left_out(context: Context) -> None:
    project = context.project
    official = write_photos(project.data / "test", 2, seed=9)
    shutil.copy(official / "3/0001.png", project.data / "train/3/other.png")
    audit.run(context)
    report = read_json(project.audit)
    for excluded, leaks in ((report["excluded"], 0), ([], 1)):
        write_json(project.audit, report | {"excluded": excluded})
        preprocess.run(context)
        dataset = open_dataset(project.dataset)
        tested = {dataset.names[row] for row in dataset.rows("test")}
        assert tested == {f"test/{path.parent.name}/{path.name}" for path in official.glob("*/*")}
        assert ("other.png" in dataset.names) == bool(leaks)
        assert read_json(project.dataset_index)["leaks"] == leaks


def test_a_failed_run_changes_nothing_and_a_damaged_dataset_is_named(context: Context) -> None:
    preprocess.run(context)
    path, before = context.project.data / "train/1/near.png", stored(context)
    path.rename(path.parent / os.fsdecode(b"odd-\xff.png"))
    with pytest.raises(DataError, match=r"UTF-8, and 'train/1/odd-\\udcff.png'"):
        preprocess.run(context)
    assert stored(context) == before
    another = before["index.json"].replace(b"near.png", b'x"}, {"name": "y')
    for name, content in (("index.json", b"{"), ("index.json", another), ("images.npy", b"")):
        path = context.project.dataset / name
        path.write_bytes(content)
        with pytest.raises(DataError, match="Run the preprocess stage again"):
            open_dataset(context.project.dataset)
        path.write_bytes(before[name])


def test_the_central_square_of_a_photo_looks_alike_at_any_size(params: Params) -> None:
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = (10, 200, 90)
    for one in (picture, picture.transpose(1, 0, 2), picture.repeat(3, 0).repeat(3, 1)):
        assert (resize(one, params.preprocess) == (10, 200, 90)).all()
    assert (resize(photo(3, 0), params.preprocess) == photo(3, 0)).all()
    hand = Image.fromarray(draw((0, 4, 0))).resize((100, 100), Image.Resampling.LANCZOS)
    small, *larger = (
        resize(np.asarray(hand.resize((side, side), Image.Resampling.LANCZOS)), params.preprocess)
        for side in (64, 65, 96, 200, 1000, 3000)
    )
    for found in larger:
        assert np.sqrt(((found.astype(float) - small) ** 2).mean()) < 3.0
