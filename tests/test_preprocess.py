"""The dataset: what is stored, at what size, and in which split.

Groups of near-duplicates stay together, and additions move nobody from training to the test.
"""

import os
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import audit, preprocess, synthetic
from tasks.data import dataset
from tasks.data.dataset import Photo, check_trainable, find_photos, open_dataset, stratified_sample
from tasks.data.images import resize, resize_square
from tasks.errors import DataError
from tasks.io import read_json, write_json
from tasks.params import AuditParams, Params, PreprocessParams, SplitParams, load_params
from tasks.preprocess import count_cross_split_duplicates, split_photos
from tasks.project import Project
from tasks.rendering.scene import draw
from tasks.stage import Context
from tasks.training.plan import training_rows
from tests.fixtures.photos import CHECKOUT, LABELS, photo, write_photos

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
    assert len(set(zip(labels, splits, strict=True))) == 3 * len(LABELS)


@pytest.mark.parametrize("sizes", [[1] * 600, [10] * 200, [5, 8, 12] * 100])
def test_shares_are_met_on_average_with_and_without_bursts(sizes: list[int]) -> None:
    names, labels, groups = grouped(sizes)
    splits = split(names, labels, groups, SHARES, 20)
    # Of groups of several sizes, the larger ones are mostly trained on.
    tolerance = 0.03 if sizes[0] == sizes[1] else 0.1
    for name, share in SHARES.items():
        assert splits.count(name) / len(names) == pytest.approx(share, abs=tolerance)
        assert splits.count(name) > 0.03 * len(names)
    assert split(names, labels, groups, SHARES, 21) != splits
    official = split(names, labels, groups, {"val": 0.1}, 20)
    assert set(official) == {"train", "val"}
    assert official.count("val") / len(names) == pytest.approx(0.1, abs=tolerance)


@pytest.mark.parametrize(("share", "in_test", "in_train"), [(1e-9, 1, 8), (1 - 2e-9, 8, 1)])
def test_extreme_shares_leave_one_group_of_each_class_to_each_split(
    share: float, in_test: int, in_train: int
) -> None:
    names, labels, groups = grouped([1] * 10)
    splits = split(names, labels, groups, {"test": share, "val": 1e-9}, 20)
    counts = Counter(zip(labels, splits, strict=True))
    expected = {"test": in_test, "val": 1, "train": in_train}
    assert counts == {(label, name): n for label in LABELS for name, n in expected.items()}


@given(seeds, st.booleans())
@FEW
def test_nobody_who_was_trained_on_is_tested_after_150_copies_were_added(
    seed: int, one_class: bool
) -> None:
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


@pytest.mark.parametrize(("official", "needed"), [(True, 2), (False, 3)])
def test_classes_with_too_few_groups_are_named_with_what_they_have(
    official: bool, needed: int
) -> None:
    photos = [Photo("train", label, str(n)) for label in LABELS for n in range(needed)]
    photos += [Photo("test", label, "x") for label in LABELS if official]
    check_trainable(photos, LABELS)
    with pytest.raises(DataError, match=rf"needs {needed} or more.*: 0 \({needed - 1}\)\. "):
        check_trainable(photos[1:], LABELS)
    held_out = ["val"] if official else ["test", "val"]
    _, labels, groups = grouped([3] * (needed - 1))
    few = rf"needs {needed} or more, .*: 0 \({needed - 1}\), 1 \({needed - 1}\)"
    with pytest.raises(DataError, match=few):
        groups_by_class(labels, groups, held_out)
    enough = groups_by_class(labels + list(LABELS), groups + list(range(100, 106)), held_out)
    assert [len(found) for found in enough.values()] == [needed] * 6


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


@given(st.data(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_near_duplicates_are_never_in_two_splits(data: Any, official: bool, seed: int) -> None:
    """Of flat grey photos, near-duplicates if their greys are close, in any folder and class."""
    folders = ("train", "test") if official else ("train",)
    one = st.tuples(st.integers(1, 60), st.sampled_from(folders), st.sampled_from("012"))
    drawn = data.draw(st.lists(one, max_size=16, unique_by=lambda found: found[0]))
    apart = [(0, folder, label) for folder in folders for label in LABELS for _ in range(4)]
    photos = [Photo(*place, f"{row}.png") for row, (_, *place) in enumerate(drawn + apart)]
    greys = np.array([grey for grey, *_ in drawn + apart], np.uint8)
    hashes = np.maximum(np.arange(len(photos)) - len(drawn) + 1, 0).astype(np.uint64)
    mirrored = np.full(len(photos), 2**63, np.uint64)
    stats = audit.ImageStats(greys.repeat(48).reshape(-1, 4, 4, 3), hashes, mirrored)
    limits = AuditParams(max_hash_distance=0, max_rms_difference=6.0)
    report = audit.audit(photos, stats, limits, LABELS)
    excluded = {entry["photo"] for entry in report["excluded"]}
    kept = [photo for photo in photos if photo.key not in excluded]
    group_of = {key: number for number, keys in enumerate(report["groups"]) for key in keys}
    split_of = split_photos(kept, group_of, SplitParams(val=0.2, test=0.2), seed, LABELS)
    assert set(split_of) == {photo.key for photo in kept}
    assert {p.key for p in photos if p.folder == "test"} <= set(split_of)
    assert count_cross_split_duplicates(split_of, group_of) == 0
    for one, other in combinations(range(len(drawn)), 2):
        keys = photos[one].key, photos[other].key
        if abs(drawn[one][0] - drawn[other][0]) <= 6 and all(key in split_of for key in keys):
            assert split_of[keys[0]] == split_of[keys[1]]


def test_test_photos_with_near_duplicates_in_other_splits_are_counted_once() -> None:
    split_of = {"a": "test", "b": "train", "c": "val", "d": "test"}

    def count(*groups: str) -> int:
        group_of = {name: number for number, names in enumerate(groups) for name in names}
        return count_cross_split_duplicates(split_of, group_of)

    assert count("ad", "bc") == count("ax", "b") == 0
    assert count("abc") == count("ac", "d") == 1
    assert count("abcd") == count("ab", "cd") == 2


def save_near(source: Path, target: Path) -> None:
    """Save a near-duplicate of a photo."""
    Image.fromarray(np.asarray(Image.open(source)) // 2 * 2).save(target)


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """Eight audited photos of each class, one of them with a near-duplicate, `near.png`."""
    project = Project(tmp_path)
    folder = write_photos(project.data / "train", 8)
    save_near(folder / "1/0004.png", folder / "1/near.png")
    context = Context(project, params)
    audit.run(context)
    return context


def index_of(context: Context) -> Any:
    return read_json(context.project.dataset_index)


def stored(context: Context) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in context.project.dataset.iterdir()}


def test_every_photo_is_stored_once_in_order_and_synthetic_hands_are_rows_of_their_own(
    context: Context,
) -> None:
    preprocess.run(context)
    first, photos = stored(context), open_dataset(context.project.dataset)
    preprocess.run(context)
    assert stored(context) == first
    assert isinstance(photos.images, np.memmap)
    assert photos.images.shape == (49, 64, 64, 3)
    order = list(zip(photos.splits, photos.labels.tolist(), photos.names, strict=True))
    assert order == sorted(order)
    assert len(set(photos.names)) == 49
    index = index_of(context)
    assert index["counts"] == {one: len(photos.rows(one)) for one in ("train", "val", "test")}
    assert index["leaks"] == 0
    for row in (0, 20, 48):
        name = photos.names[row]
        # Names that stand in several classes are paths; only one photo is called near.png.
        path = context.project.data / ("train/1/near.png" if name == "near.png" else name)
        assert path.parent.name == LABELS[photos.labels[row]]
        assert (photos.images[row] == np.asarray(Image.open(path))).all()

    hands = context.params.synthetic.model_copy(update={"per_class": 3})
    both = replace(context, params=context.params.model_copy(update={"synthetic": hands}))
    synthetic.run(both)
    preprocess.run(both)
    dataset = open_dataset(context.project.dataset)
    assert index_of(context) == index | {"synthetic": 3}
    assert dataset.splits == (*photos.splits, *["synthetic"] * 18)
    assert dataset.labels[dataset.rows("synthetic")].tolist() == [n // 3 for n in range(18)]
    assert np.array_equal(dataset.images[:49], photos.images)
    fifth = dataset.images[dataset.rows("synthetic")[4]]
    assert np.array_equal(fifth, draw((synthetic.FIRST_SEED + both.params.seed, 1, 1)))
    trained = set(training_rows(dataset, 1.0, seed=1).tolist())
    assert trained == {*dataset.rows("train"), *dataset.rows("synthetic")}


def test_near_duplicates_of_an_official_test_are_left_out(context: Context) -> None:
    project = context.project
    official = write_photos(project.data / "test", 2, seed=9)
    save_near(official / "3/0001.png", project.data / "train/3/other.png")
    audit.run(context)
    report = read_json(project.audit)
    for excluded, leaks in ((report["excluded"], 0), ([], 1)):
        write_json(project.audit, report | {"excluded": excluded})
        preprocess.run(context)
        dataset = open_dataset(project.dataset)
        tested = {dataset.names[row] for row in dataset.rows("test")}
        assert tested == {
            photo.key for photo in find_photos(project.data) if photo.folder == "test"
        }
        assert ("other.png" in dataset.names) == bool(leaks)
        assert index_of(context)["leaks"] == leaks


def test_a_photo_put_there_by_hand_is_upright_and_a_failed_run_changes_nothing(
    context: Context,
) -> None:
    path, picture = context.project.data / "train/1/near.png", photo(1, 77, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(path, exif=exif)
    audit.run(context)
    preprocess.run(context)
    dataset, before = open_dataset(context.project.dataset), stored(context)
    found = dataset.images[dataset.names.index("near.png")]
    assert np.array_equal(found, np.rot90(picture, -1))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"1/near\.png"):
        preprocess.run(context)
    path.rename(path.parent / os.fsdecode(b"odd-\xff.png"))
    with pytest.raises(DataError, match=r"UTF-8, and 'train/1/odd-\\udcff.png'"):
        preprocess.run(context)
    assert stored(context) == before
    assert [p.name for p in context.project.artifacts.iterdir() if p.name.startswith(".")] == []
    pictures, index = (context.project.dataset / name for name in ("images.npy", "index.json"))
    for damage in (
        lambda: index.write_text("{"),
        lambda: np.save(pictures, np.zeros((3, 64, 64, 3), np.uint8)),
        lambda: pictures.write_bytes(before["images.npy"][:5000]),
        pictures.unlink,
    ):
        damage()
        with pytest.raises(DataError, match="Run the preprocess stage again"):
            open_dataset(context.project.dataset)
        index.write_bytes(before["index.json"])


def test_the_central_square_is_kept_and_a_larger_photo_looks_alike_and_may_be_blurred() -> None:
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = (10, 200, 90)
    blurring = PreprocessParams(image_size=64, blur_sigma=0.5)
    for one in (picture, picture.transpose(1, 0, 2), picture.repeat(3, 0).repeat(3, 1)):
        assert (resize(one, blurring) == (10, 200, 90)).all()
    assert (resize(photo(3, 0), blurring) == photo(3, 0)).all()
    params = load_params(CHECKOUT.params).preprocess
    hand = Image.fromarray(draw((0, 4, 0))).resize((100, 100), Image.Resampling.LANCZOS)
    scaled = {
        side: resize(np.asarray(hand.resize((side, side), Image.Resampling.LANCZOS)), params)
        for side in (64, 65, 96, 200, 1000, 3000)
    }
    for found in scaled.values():
        assert np.sqrt(((found.astype(float) - scaled[64]) ** 2).mean()) < 3.0
    stripes = np.tile(np.array([60, 180], np.uint8), (64, 32))[..., np.newaxis].repeat(3, axis=2)
    for scale, left in ((2, 0.756), (40, 0.58)):
        large = stripes.repeat(scale, axis=0).repeat(scale, axis=1)
        sharp, soft = (
            one[4:-4, 4:-4] for one in (resize_square(large, 64), resize(large, blurring))
        )
        assert np.ptp(soft) / np.ptp(sharp) == pytest.approx(left, abs=0.02)
        assert abs(soft.mean() - 120) <= 0.5
