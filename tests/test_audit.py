"""The audit: what it counts, what it names, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks import audit
from tasks.data.photos import find_photos
from tasks.errors import DataError
from tasks.params import LABELS, AuditParams, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import write_photos


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """Six photos of each class in train, no test, nothing alike."""
    project = Project(tmp_path)
    write_photos(project.data / "train", 6)
    alike = AuditParams(max_hash_distance=10, max_rms_difference=6.0)
    return Context(project, params.model_copy(update={"audit": alike}))


def _copy(source: Path, target: Path, brighter: int = 0) -> Path:
    """Save the same picture in another file, a little brighter or not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(Image.open(source)).astype(int) + brighter
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(target)
    return target


def _report(context: Context) -> dict:
    audit.run(context)
    return json.loads(context.project.audit.read_text())


def test_counts_sizes_and_balance_are_reported(context: Context) -> None:
    write_photos(context.project.data / "test", 2, size=80, seed=1)
    for name in ("0000.png", "0001.png", "0002.png"):
        (context.project.data / "train" / "3" / name).unlink()
    report = _report(context)
    assert report["photos"] == 45
    assert report["counts"]["train"] == {label: 3 if label == "3" else 6 for label in LABELS}
    assert report["counts"]["test"] == dict.fromkeys(LABELS, 2)
    assert report["imbalance"] == 2.0
    assert report["sizes"]["distinct"] == 2
    assert report["sizes"]["height"] == {"min": 64, "median": 64.0, "max": 80}
    assert report["pairs"] == report["excluded"] == report["warnings"] == []
    assert report["duplicates"] == 0


def test_near_duplicates_in_train_are_counted_and_kept(context: Context) -> None:
    folder = context.project.data / "train" / "2"
    _copy(folder / "0001.png", folder / "copy.png", brighter=2)
    _copy(folder / "0001.png", folder / "exact.png")
    report = _report(context)
    assert report["duplicates"] == 2
    assert report["groups"] == [["train/2/0001.png", "train/2/copy.png", "train/2/exact.png"]]
    # Of three pairs, the two closest join the group.
    assert [pair["rms"] for pair in report["pairs"]] == pytest.approx([2.0, 0.0], abs=0.1)
    assert report["excluded"] == []


def test_a_long_burst_is_one_group_with_a_short_list_of_pairs(context: Context) -> None:
    folder = context.project.data / "train" / "2"
    for number in range(90):
        _copy(folder / "0001.png", folder / f"burst-{number:02d}.png", brighter=number % 3)
    report = _report(context)
    (group,) = report["groups"]
    assert len(group) == 91
    assert len(report["pairs"]) == 90


def test_photos_of_a_burst_are_excluded_with_the_one_that_represents_them(
    context: Context,
) -> None:
    train = context.project.data / "train"
    for number in range(90):
        _copy(train / "2" / "0001.png", train / "2" / f"burst-{number:02d}.png", number % 3)
    _copy(train / "2" / "0001.png", train / "3" / "wrong.png", brighter=4)
    excluded = {entry["photo"] for entry in _report(context)["excluded"]}
    assert len(excluded) == 92
    assert "train/3/wrong.png" in excluded


def test_near_duplicates_of_the_official_test_are_excluded(context: Context) -> None:
    data = context.project.data
    write_photos(data / "test", 3, seed=1)
    _copy(data / "test" / "5" / "0002.png", data / "train" / "5" / "near.png", brighter=3)
    _copy(data / "train" / "5" / "near.png", data / "train" / "5" / "chain.png", brighter=4)
    report = _report(context)
    assert [entry["photo"] for entry in report["excluded"]] == [
        "train/5/chain.png",
        "train/5/near.png",
    ]
    assert {entry["of"] for entry in report["excluded"]} == {"test/5/0002.png"}
    assert {tuple(pair["photos"]) for pair in report["across"]} >= {
        ("test/5/0002.png", "train/5/near.png")
    }
    assert len(report["warnings"]) == 1


def test_near_duplicates_with_two_labels_are_both_excluded(context: Context) -> None:
    data = context.project.data
    _copy(data / "train" / "1" / "0003.png", data / "train" / "4" / "odd.png", brighter=2)
    report = _report(context)
    assert [pair["photos"] for pair in report["conflicts"]] == [
        ["train/1/0003.png", "train/4/odd.png"]
    ]
    assert {entry["photo"]: entry["reason"] for entry in report["excluded"]} == {
        "train/1/0003.png": "near-duplicate with another label",
        "train/4/odd.png": "near-duplicate with another label",
    }


def test_photos_that_only_a_conflict_joins_count_for_their_own_classes(context: Context) -> None:
    data = context.project.data
    write_photos(data / "test", 2, seed=1)
    for number in range(1, 6):
        (data / "train" / "4" / f"{number:04d}.png").unlink()
    first = data / "train" / "1" / "0000.png"
    _copy(first, data / "train" / "1" / "b.png", brighter=5)
    _copy(first, data / "train" / "4" / "c.png", brighter=10)
    _copy(first, data / "train" / "4" / "d.png", brighter=15)
    report = _report(context)
    assert [entry["photo"] for entry in report["excluded"]] == ["train/1/b.png", "train/4/c.png"]
    assert len(report["groups"]) == 1


def test_a_test_photo_is_never_excluded(context: Context) -> None:
    data = context.project.data
    write_photos(data / "test", 3, seed=1)
    _copy(data / "test" / "0" / "0000.png", data / "test" / "3" / "odd.png", brighter=2)
    report = _report(context)
    assert len(report["conflicts"]) == 1
    assert report["excluded"] == []


@pytest.mark.parametrize("folder", ["train", "test"])
def test_the_same_picture_under_two_labels_fails_and_names_both(
    context: Context, folder: str
) -> None:
    data = context.project.data
    write_photos(data / "test", 3, seed=1)
    _copy(data / "train" / "1" / "0003.png", data / folder / "2" / "odd.png")
    with pytest.raises(DataError, match="two labels") as refused:
        audit.run(context)
    assert "train/1/0003.png" in str(refused.value)
    assert f"{folder}/2/odd.png" in str(refused.value)
    assert not context.project.audit.exists()


@pytest.mark.parametrize("folder", ["train", "test"])
def test_a_missing_class_fails_and_is_named(context: Context, folder: str) -> None:
    write_photos(context.project.data / "test", 3, seed=1)
    shutil.rmtree(context.project.data / folder / "4")
    with pytest.raises(DataError, match=f"none in {folder}/4"):
        audit.run(context)


def test_a_class_too_small_to_split_fails(context: Context) -> None:
    for number in range(1, 6):
        (context.project.data / "train" / "0" / f"{number:04d}.png").unlink()
    with pytest.raises(DataError, match="Class 0 has too few"):
        audit.run(context)


def test_a_class_that_exclusion_empties_fails(context: Context) -> None:
    data = context.project.data
    write_photos(data / "test", 6, seed=0)
    for label in LABELS[1:]:
        shutil.rmtree(data / "test" / label)
        write_photos(data / "other", 2, seed=7)
        shutil.copytree(data / "other" / label, data / "test" / label)
    shutil.rmtree(data / "other")
    with pytest.raises(DataError, match="Class 0 has too few"):
        audit.run(context)


def test_an_unknown_label_folder_fails(context: Context) -> None:
    (context.project.data / "train" / "six").mkdir()
    _copy(
        context.project.data / "train" / "1" / "0000.png",
        context.project.data / "train" / "six" / "a.png",
    )
    with pytest.raises(DataError, match="'six' in"):
        audit.run(context)


def test_no_photos_at_all_fails(tmp_path: Path, params: Params) -> None:
    with pytest.raises(DataError, match="no photos to train on"):
        audit.run(Context(Project(tmp_path), params))


def test_a_damaged_stored_photo_fails_and_is_named(context: Context) -> None:
    path = context.project.data / "train" / "3" / "0002.png"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"3/0002\.png"):
        audit.run(context)


def test_a_lopsided_set_is_warned_about(context: Context) -> None:
    for number in (0, 1, 2):
        (context.project.data / "train" / "5" / f"{number:04d}.png").unlink()
    write_photos(context.project.data / "train", 10)
    for number in range(3, 10):
        (context.project.data / "train" / "5" / f"{number:04d}.png").unlink()
    report = _report(context)
    assert report["imbalance"] == pytest.approx(3.333)
    assert report["warnings"] == ["the largest class has 3.333 times the smallest's photos"]


def test_the_same_photos_give_the_same_bytes(context: Context, tmp_path: Path) -> None:
    project = context.project
    _copy(project.data / "train" / "2" / "0001.png", project.data / "train" / "2" / "copy.png", 2)
    audit.run(context)
    other = Project(tmp_path / "other")
    shutil.copytree(project.data, other.data)
    audit.run(replace(context, project=other))
    assert project.audit.read_bytes() == other.audit.read_bytes()
    picture = (project.plots / "audit.png").read_bytes()
    assert picture == (other.plots / "audit.png").read_bytes()
    assert Image.open(project.plots / "audit.png").size > (600, 300)


def test_hidden_files_are_not_photos(context: Context) -> None:
    before = len(find_photos(context.project.data))
    (context.project.data / "train" / "0" / ".note").write_text("not a photo")
    assert len(find_photos(context.project.data)) == before == 36
