"""The audit: what it counts, what it names, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks import audit
from tasks.errors import DataError
from tasks.params import AuditParams, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import LABELS, write_photos


@pytest.fixture
def context(tmp_path: Path, params: Params) -> Context:
    """Six photos of each class in train, no test, nothing alike."""
    project = Project(tmp_path)
    write_photos(project.data / "train", 6)
    alike = AuditParams(max_hash_distance=10, max_rms_difference=6.0)
    return Context(project, params.model_copy(update={"audit": alike}))


@pytest.fixture
def copy(context: Context) -> Callable[..., Path]:
    """`copy(from, to, brighter)`: the same picture again, paths below `data/`."""

    def write(source: str, target: str, brighter: int = 0) -> Path:
        path = context.project.data / target
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(Image.open(context.project.data / source)).astype(int) + brighter
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
        return path

    return write


def _report(context: Context) -> dict:
    audit.run(context)
    return json.loads(context.project.audit.read_text())


def _pairs(report: dict, kind: str) -> list[list[str]]:
    return [pair["photos"] for pair in report[kind]]


def test_counts_and_balance_are_reported(context: Context) -> None:
    write_photos(context.project.data / "test", 2, size=80, seed=1)
    for number in range(1, 6):
        (context.project.data / f"train/3/{number:04d}.png").unlink()
    write_photos(context.project.data / "train", 2, seed=7)
    (context.project.data / "train/0/.note").write_text("hidden")
    report = _report(context)
    assert report["photos"] == 44
    assert report["counts"]["train"] == {label: 2 if label == "3" else 6 for label in LABELS}
    assert report["counts"]["test"] == dict.fromkeys(LABELS, 2)
    assert report["imbalance"] == 3.0
    for name in ("conflicts", "across", "closest", "groups", "excluded", "warnings"):
        assert report[name] == []
    write_photos(context.project.data / "train", 10)
    for number in range(3, 10):
        (context.project.data / f"train/5/{number:04d}.png").unlink()
    assert _report(context)["warnings"] == [
        "the largest class has 3.333 times the smallest's photos"
    ]


def test_near_duplicates_in_train_are_counted_and_kept(
    context: Context, copy: Callable[..., Path]
) -> None:
    copy("train/2/0001.png", "train/2/copy.png", 2)
    copy("train/2/0001.png", "train/2/exact.png")
    report = _report(context)
    assert report["duplicates"] == 2
    assert report["groups"] == [["train/2/0001.png", "train/2/copy.png", "train/2/exact.png"]]
    assert [pair["rms"] for pair in report["closest"]] == pytest.approx([0, 2, 2], abs=0.1)
    assert report["excluded"] == []


def test_photos_of_a_burst_are_excluded_with_the_one_that_represents_them(
    context: Context, copy: Callable[..., Path]
) -> None:
    for number in range(90):
        copy("train/2/0001.png", f"train/2/burst-{number:02d}.png", number % 3)
    copy("train/2/0001.png", "train/3/wrong.png", 4)
    report = _report(context)
    assert [len(group) for group in report["groups"]] == [91]
    assert len(report["closest"]) == audit.CLOSEST
    excluded = {entry["photo"] for entry in report["excluded"]}
    assert len(excluded) == 92
    assert "train/3/wrong.png" in excluded


def test_near_duplicates_of_the_official_test_are_excluded(
    context: Context, copy: Callable[..., Path]
) -> None:
    write_photos(context.project.data / "test", 3, seed=1)
    copy("test/5/0002.png", "train/5/near.png", 3)
    copy("train/5/near.png", "train/5/chain.png", 4)
    copy("test/0/0000.png", "test/3/odd.png", 2)
    report = _report(context)
    reason = {"reason": "near-duplicate in the official test", "of": "test/5/0002.png"}
    assert report["excluded"] == [
        {"photo": f"train/5/{name}.png", **reason} for name in ("chain", "near")
    ]
    assert ["test/5/0002.png", "train/5/near.png"] in _pairs(report, "across")
    # Within the test, a conflict is reported and excludes nothing.
    assert _pairs(report, "conflicts") == [["test/0/0000.png", "test/3/odd.png"]]
    assert report["warnings"] == [
        "1 pairs of near-duplicates have two labels",
        "1 pairs of near-duplicates across train and test",
    ]


def test_near_duplicates_with_two_labels_are_both_excluded(
    context: Context, copy: Callable[..., Path]
) -> None:
    write_photos(context.project.data / "test", 2, seed=1)
    for number in range(1, 6):
        (context.project.data / f"train/4/{number:04d}.png").unlink()
    copy("train/1/0000.png", "train/1/b.png", 5)
    copy("train/1/0000.png", "train/4/c.png", 10)
    copy("train/1/0000.png", "train/4/d.png", 15)
    report = _report(context)
    assert _pairs(report, "conflicts") == [["train/1/b.png", "train/4/c.png"]]
    reason = "near-duplicate with another label"
    assert report["excluded"] == [
        {"photo": "train/1/b.png", "reason": reason, "of": "train/4/c.png"},
        {"photo": "train/4/c.png", "reason": reason, "of": "train/1/b.png"},
    ]
    # What only the conflict joins stays in groups of its own label.
    assert report["groups"] == [
        ["train/1/0000.png", "train/1/b.png"],
        ["train/4/c.png", "train/4/d.png"],
    ]
    assert report["duplicates"] == 3


@pytest.mark.parametrize("folder", ["train", "test"])
def test_the_same_picture_under_two_labels_fails_and_names_both(
    context: Context, copy: Callable[..., Path], folder: str
) -> None:
    write_photos(context.project.data / "test", 3, seed=1)
    for number in range(6):
        copy(f"train/1/{number:04d}.png", f"{folder}/2/odd-{number}.png")
    with pytest.raises(DataError, match=r"two labels: .*; and 1 more") as refused:
        audit.run(context)
    for name in ("train/1/0003.png", f"{folder}/2/odd-3.png"):
        assert name in str(refused.value)
    assert not context.project.audit.exists()


@pytest.mark.parametrize("folder", ["train", "test"])
def test_a_missing_class_fails_and_is_named(context: Context, folder: str) -> None:
    write_photos(context.project.data / "test", 3, seed=1)
    shutil.rmtree(context.project.data / folder / "4")
    with pytest.raises(DataError, match=f"none in {folder}/4"):
        audit.run(context)


def test_a_class_too_small_to_split_fails_also_if_exclusion_makes_it_so(
    context: Context, copy: Callable[..., Path]
) -> None:
    write_photos(context.project.data / "test", 2, seed=9)
    for number in range(5):
        copy(f"train/0/{number:04d}.png", f"test/0/{number}.png", 2)
    with pytest.raises(DataError, match=r"needs 2 or more.* have fewer: 0 \(1\)"):
        audit.run(context)
    shutil.rmtree(context.project.data / "test")
    _report(context)
    for number in range(2, 6):
        (context.project.data / f"train/0/{number:04d}.png").unlink()
    with pytest.raises(DataError, match=r"needs 3 or more.* have fewer: 0 \(2\)"):
        audit.run(context)


def test_what_cannot_be_read_is_named(context: Context, copy: Callable[..., Path]) -> None:
    path = context.project.data / "train/3/0002.png"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"3/0002\.png"):
        audit.run(context)
    copy("train/1/0000.png", "train/six/a.png")
    with pytest.raises(DataError, match="'six' in"):
        audit.run(context)
    shutil.rmtree(context.project.data)
    with pytest.raises(DataError, match="no photos to train on"):
        audit.run(context)


def test_the_same_photos_give_the_same_bytes(
    context: Context, copy: Callable[..., Path], tmp_path: Path
) -> None:
    project, other = context.project, Project(tmp_path / "other")
    copy("train/2/0001.png", "train/2/copy.png", 2)
    audit.run(context)
    shutil.copytree(project.data, other.data)
    audit.run(replace(context, project=other))
    assert project.audit.read_bytes() == other.audit.read_bytes()
    picture = (project.plots / "audit.png").read_bytes()
    assert picture == (other.plots / "audit.png").read_bytes()
    assert Image.open(project.plots / "audit.png").size > (600, 300)
