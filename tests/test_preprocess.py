"""The stored dataset: what is in it, at what size, and in which split."""

import os
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import audit, preprocess, synthetic
from tasks.data import images
from tasks.data.dataset import Photo, find_photos, open_dataset
from tasks.data.images import resize_square
from tasks.errors import DataError
from tasks.io import read_json, write_json
from tasks.params import AuditParams, Params, PreprocessParams, SplitParams, load_params
from tasks.preprocess import count_cross_split_duplicates, split_photos
from tasks.project import Project
from tasks.rendering.scene import draw
from tasks.stage import Context
from tasks.training.plan import training_rows
from tests.fixtures.photos import CHECKOUT, LABELS, photo, write_photos

BLUR = 0.5


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    """Resize with a blur of 0.5."""
    params = PreprocessParams.model_construct(image_size=size, blur_sigma=BLUR)
    return images.resize(picture, params)


def save_near(source: Path, target: Path) -> None:
    """Save a near-duplicate of a photo."""
    Image.fromarray(np.asarray(Image.open(source)) // 2 * 2).save(target)


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """Eight audited photos of each class, one of them with a near-duplicate, `near.png`."""
    project = Project(tmp_path)
    # The photos' own size, so that the dataset holds their pixels.
    kept = PreprocessParams(image_size=64, blur_sigma=BLUR)
    folder = write_photos(project.data / "train", 8)
    save_near(folder / "1/0004.png", folder / "1/near.png")
    context = Context(project, params.model_copy(update={"preprocess": kept}))
    audit.run(context)
    return context


def changed(context: Context, section: str, **values: int) -> Context:
    part = getattr(context.params, section).model_copy(update=values)
    return replace(context, params=context.params.model_copy(update={section: part}))


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
    assert not photos.images.flags.writeable
    assert photos.images.shape == (49, 64, 64, 3)
    order = list(zip(photos.splits, photos.labels.tolist(), photos.names, strict=True))
    assert order == sorted(order)
    assert len(set(photos.names)) == 49
    index = index_of(context)
    assert index["counts"] == {one: len(photos.rows(one)) for one in ("train", "val", "test")}
    assert min(index["counts"].values()) >= len(LABELS)
    assert index["leaks"] == 0
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
    assert index_of(context) == index | {"synthetic": 3}
    assert dataset.splits == (*photos.splits, *["synthetic"] * 18)
    assert dataset.labels[dataset.rows("synthetic")].tolist() == [n // 3 for n in range(18)]
    assert np.array_equal(dataset.images[:49], photos.images)
    fifth = dataset.images[dataset.rows("synthetic")[4]]
    assert np.array_equal(fifth, draw((synthetic.FIRST_SEED + both.params.seed, 1, 1)))
    trained = set(training_rows(dataset, 1.0, seed=1).tolist())
    assert trained == {*dataset.rows("train"), *dataset.rows("synthetic")}


def test_near_duplicates_stay_in_one_split_and_out_of_an_official_test(context: Context) -> None:
    for seed in range(8):
        preprocess.run(replace(context, params=context.params.model_copy(update={"seed": seed})))
        dataset = open_dataset(context.project.dataset)
        split_of = dict(zip(dataset.names, dataset.splits, strict=True))
        assert split_of["train/1/0004.png"] == split_of["near.png"]
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


def test_test_photos_with_near_duplicates_in_other_splits_are_counted_once() -> None:
    split_of = {"a": "test", "b": "train", "c": "val", "d": "test"}

    def count(*groups: str) -> int:
        group_of = {name: number for number, names in enumerate(groups) for name in names}
        return count_cross_split_duplicates(split_of, group_of)

    assert count("ad", "bc") == count("ax", "b") == 0
    assert count("abc") == count("ac", "d") == 1
    assert count("abcd") == count("ab", "cd") == 2


def test_a_photo_put_there_by_hand_is_upright_and_has_a_utf_8_name(context: Context) -> None:
    path, picture = context.project.data / "train/1/near.png", photo(1, 77, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(path, exif=exif)
    audit.run(context)
    preprocess.run(context)
    dataset = open_dataset(context.project.dataset)
    found = dataset.images[dataset.names.index("near.png")]
    assert np.array_equal(found, np.rot90(picture, -1))
    path.rename(path.parent / os.fsdecode(b"odd-\xff.png"))
    with pytest.raises(DataError, match=r"UTF-8, and 'train/1/odd-\\udcff.png'"):
        preprocess.run(context)


@st.composite
def audited_photos(draw: st.DrawFn) -> tuple[list[Photo], list[int], dict]:
    """Flat grey photos, near-duplicates if their greys are close, in any folder and class."""
    folders = draw(st.sampled_from([("train",), ("test", "train")]))
    one = st.tuples(st.integers(1, 60), st.sampled_from(folders), st.sampled_from("012"))
    drawn = draw(st.lists(one, max_size=16, unique_by=lambda found: found[0]))
    apart = [(0, folder, label) for folder in folders for label in LABELS for _ in range(4)]
    greys, places = zip(*((grey, place) for grey, *place in drawn + apart), strict=True)
    photos = [Photo(*place, f"{row}.png") for row, place in enumerate(places)]
    pictures = np.broadcast_to(
        np.array(greys, np.uint8)[:, None, None, None], (len(photos), 4, 4, 3)
    )
    stats = audit.ImageStats(
        pictures=pictures.copy(),
        hashes=np.array([0] * len(drawn) + list(range(1, len(apart) + 1)), np.uint64),
        mirrored=np.full(len(photos), 2**63, np.uint64),
    )
    params = AuditParams(max_hash_distance=0, max_rms_difference=6.0)
    return photos, [grey for grey, *_ in drawn], audit.audit(photos, stats, params, LABELS)


@given(audited_photos(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_near_duplicates_are_never_in_two_splits(
    audited: tuple[list[Photo], list[int], dict], seed: int
) -> None:
    photos, greys, report = audited
    excluded = {entry["photo"] for entry in report["excluded"]}
    kept = [photo for photo in photos if photo.key not in excluded]
    group_of = {key: number for number, keys in enumerate(report["groups"]) for key in keys}
    split_of = split_photos(kept, group_of, SplitParams(val=0.2, test=0.2), seed, LABELS)
    assert set(split_of) == {photo.key for photo in kept}
    assert {p.key for p in photos if p.folder == "test"} <= set(split_of)
    assert count_cross_split_duplicates(split_of, group_of) == 0
    for one, other in combinations(range(len(greys)), 2):
        keys = photos[one].key, photos[other].key
        if abs(greys[one] - greys[other]) <= 6 and all(key in split_of for key in keys):
            assert split_of[keys[0]] == split_of[keys[1]]


def test_a_failed_run_changes_nothing_and_a_damaged_dataset_is_refused(context: Context) -> None:
    preprocess.run(context)
    folder, before = context.project.dataset, stored(context)
    damaged = context.project.data / "train/5/0007.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(DataError, match=r"5/0007\.png"):
        preprocess.run(context)
    damaged.unlink()
    with pytest.raises(DataError, match="audit is of other photos"):
        preprocess.run(context)
    assert stored(context) == before
    assert [p.name for p in context.project.artifacts.iterdir() if p.name.startswith(".")] == []
    pictures, index = folder / "images.npy", folder / "index.json"
    for damage in (
        lambda: index.write_text("{"),
        lambda: np.save(pictures, np.zeros((3, 64, 64, 3), np.uint8)),
        lambda: pictures.write_bytes(before["images.npy"][:5000]),
        pictures.unlink,
    ):
        damage()
        with pytest.raises(DataError, match="Run the preprocess stage again"):
            open_dataset(folder)
        index.write_bytes(before["index.json"])
    shutil.rmtree(folder)


def test_the_central_square_is_kept() -> None:
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = (10, 200, 90)
    assert (resize(picture, 20) == (10, 200, 90)).all()
    assert (resize(picture.transpose(1, 0, 2), 20) == (10, 200, 90)).all()
    assert (resize(picture, 90) == (10, 200, 90)).all()
    same = photo(3, 0)
    assert (resize(same, 64) == same).all()
    assert not np.shares_memory(resize(same, 64), same)


@pytest.mark.parametrize("size", [65, 96, 200, 1000, 3000])
def test_a_photo_looks_alike_at_any_size(size: int) -> None:
    params = load_params(CHECKOUT.params).preprocess
    hand = Image.fromarray(draw((0, 4, 0))).resize((100, 100), Image.Resampling.LANCZOS)
    thumbnail, photo = (
        images.resize(np.asarray(hand.resize((side, side), Image.Resampling.LANCZOS)), params)
        for side in (64, size)
    )
    assert np.sqrt(((photo.astype(float) - thumbnail) ** 2).mean()) < 3.0


@pytest.mark.parametrize(("scale", "left"), [(2, 0.756), (40, 0.58)])
def test_a_photo_that_was_larger_is_blurred_and_keeps_its_brightness(
    scale: int, left: float
) -> None:
    stripes = np.tile(np.array([60, 180], np.uint8), (32, 16))[..., np.newaxis].repeat(3, axis=2)
    large = stripes.repeat(scale, axis=0).repeat(scale, axis=1)
    sharp, soft = resize_square(large, 32)[4:-4, 4:-4], resize(large, 32)[4:-4, 4:-4]
    assert np.ptp(soft) / np.ptp(sharp) == pytest.approx(left, abs=0.02)
    assert abs(soft.mean() - 120) <= 0.5
