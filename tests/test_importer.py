"""Imports from sources and the inbox: complete or without effect, and no harm to `data/`."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from tasks.data.directory import stored_photos
from tasks.data.images import MAX_BYTES, encode
from tasks.data.importer import (
    Candidate,
    Inbox,
    apply_import_rules,
    import_photos,
    list_bucket,
    list_folder,
)
from tasks.errors import DataError, ServiceError, SourceError
from tasks.io import read_json
from tasks.project import Project
from tasks.services.s3 import Storage
from tests.fixtures.photos import LABELS, photo, with_params, write_photos

PNG = [encode(photo(label, 9, 32)) for label in range(6)]
EVERY = [("train", label) for label in LABELS]
VERSION = "0123456789abcdef.dir"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return with_params(tmp_path / "checkout")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def source(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a class folder; `files` are its paths and contents."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_photos_are_added_or_replace_all(project: Project, tmp_path: Path) -> None:
    report = import_photos(project, write_photos(tmp_path / "a", 2))
    assert report.imported == dict.fromkeys(EVERY, 2)
    assert sorted(tree(project.data).values()) == sorted(tree(tmp_path / "a").values())
    linked = next(project.data.rglob("*.png"))  # as DVC may link photos into its cache
    cached = linked.rename(project.root / "cached")
    linked.symlink_to(os.path.relpath(cached, linked.parent))

    def state() -> set[tuple[Path, int, int]]:
        found = [(path, path.lstat()) for path in project.data.rglob("*.png") if path != linked]
        return {(path, facts.st_ino, facts.st_mtime_ns) for path, facts in found}

    before, folder = state(), project.data.stat().st_ino
    report = import_photos(project, tmp_path / "a")
    assert (report.imported, report.already_there) == ({}, dict.fromkeys(EVERY, 2))
    assert (state(), project.data.stat().st_ino) == (before, folder)
    more = source(
        write_photos(tmp_path / "b", 1, seed=1),
        {"5/known.png": (tmp_path / "a/5/0000.png").read_bytes()},
    )
    tested = source(write_photos(tmp_path / "c", 1, seed=2), {"0/.DS_Store": b"clutter"})
    report = import_photos(project, more, tested)
    assert (report.already_there, report.ignored) == ({("train", "5"): 1}, 1)
    assert report.imported == dict.fromkeys([*EVERY, *(("test", label) for label in LABELS)], 1)
    assert len(tree(project.data)) == 24
    assert linked.is_symlink()
    assert before <= state()
    (more / "4/0000.png").rename(more / "5/moved.png")
    new = source(more, {"0/new.png": PNG[0]})
    report = import_photos(project, new, replace=True)
    assert report.imported == {("train", "0"): 1, ("train", "5"): 1}
    assert (sum(report.already_there.values()), report.removed) == (6, 18)
    assert sorted(tree(project.data).values()) == sorted(tree(new).values())


IMPORTED, ALREADY_THERE = "imported", "already there"
LABELLED = "same photo under two labels: 0 and 3"
TESTED, TRAINED = (f"same photo in train and test: it stays in {one}" for one in ("test", "train"))
RULES = {
    "two labels": ("", "train/0/a train/3/a train/2/b", [LABELLED, LABELLED, IMPORTED]),
    "known label": ("train/3/a", "train/0/a train/3/a", [LABELLED, ALREADY_THERE]),
    "two splits": ("", "train/0/a test/0/a train/1/b", [TESTED, IMPORTED, IMPORTED]),
    "known split": ("train/0/a", "test/0/a train/1/b", [TRAINED, IMPORTED]),
    "twice": ("", "test/0/a test/0/a", [IMPORTED, ALREADY_THERE]),
}
"""What `data/` has, what a source has, and what is decided on each."""


@pytest.mark.parametrize(("stored", "new", "decisions"), RULES.values(), ids=RULES)
def test_the_same_photo_twice_is_decided_alike(stored: str, new: str, decisions: list[str]) -> None:
    def places(words: str) -> list[tuple[str, tuple[str, str]]]:
        parts = [word.split("/") for word in words.split()]
        return [(name, (split, label)) for split, label, name in parts]

    there, wanted = dict(places(stored)), places(new)
    candidates = [Candidate("", *one) for one in wanted]
    assert apply_import_rules(candidates, there) == decisions
    assert sorted(apply_import_rules(candidates[::-1], there)) == sorted(decisions)
    there |= {one for one, what in zip(wanted, decisions, strict=True) if what == IMPORTED}
    again = [ALREADY_THERE if one == IMPORTED else one for one in decisions]
    assert apply_import_rules(candidates, there) == again


def test_the_quarantine_lists_what_was_rejected_and_why(project: Project, tmp_path: Path) -> None:
    files = {
        "0/a.png": PNG[0],
        "0/b.png": b"text",
        "7/c.png": PNG[1],
        "1/d.png": b"",
        "2/e.png": b"",
    }
    files |= {"0/x\n\x1b[31m é.jpg": b"hostile", "3/a.png": PNG[5], "4/a.png": PNG[5]}
    folder, listing = source(tmp_path / "s", files), project.quarantine / "quarantine.json"
    os.truncate(folder / "2/e.png", 2 * MAX_BYTES)
    expected = {"s/0/b.png": "not an image", "s/1/d.png": "zero bytes", "s/2/e.png": "too large"}
    expected |= {"s/7/c.png": "unknown label folder", r"s/0/x\n\x1b[31m é.jpg": "not an image"}
    expected |= dict.fromkeys(["s/3/a.png", "s/4/a.png"], "same photo under two labels")
    for _ in range(2):
        report = import_photos(project, folder)
        assert {file.origin: file.kind for file in report.quarantined} == expected
    assert report.kinds() == {kind: [*expected.values()].count(kind) for kind in expected.values()}
    unknown = "unknown label folder: '7' is none of 0, 1, 2, 3, 4, 5; 1 files quarantined"
    assert (report.unknown_folders(), report.labels) == ([unknown], LABELS)
    shown = json.loads(json.dumps(report.to_json()))
    assert shown["already_there"] == {"train": {"0": 1}, "test": {}}
    assert shown["quarantined"] == read_json(listing)["files"]
    import_photos(project, source(tmp_path / "good", {"0/a.png": PNG[2]}))
    assert read_json(listing)["files"] == []


def stop(point: str, kill: bool, what: str, done: int, total: int) -> None:
    if f"{what} {done}" == point:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt


def test_what_fails_changes_nothing(project: Project, tmp_path: Path) -> None:
    import_photos(project, write_photos(tmp_path / "old", 1))
    before = tree(project.data)
    both = source(tmp_path / "both", {"train/0/a.png": PNG[0], "test/0/b.png": PNG[1]})
    one = source(tmp_path / "one", {"0/a.png": PNG[3]})
    bad = source(tmp_path / "bad", {"0/a.png": b"text", "1/b.png": b"", "2/c.png": b"t"})
    for sources, reason in (
        ((tmp_path / "nothing",), "No such file"),
        ((both, one), "must be one set of photos"),
        ((one, both), "must be one set of photos"),
        ((bad,), "no usable photo: 2 not an image, 1 zero bytes"),
    ):
        for replacing in (False, True):
            with pytest.raises(SourceError, match=reason):
                import_photos(project, *sources, replace=replacing)
    with pytest.raises(KeyboardInterrupt):
        import_photos(project, one, replace=True, progress=partial(stop, "swap 1", False))
    assert tree(project.data) == before
    project.staging.write_text("a file where a folder must be")
    with pytest.raises(DataError, match=r"Import failed at '.*import' \(File exists\)"):
        import_photos(project, one)
    assert tree(project.data) == before


@pytest.mark.parametrize("point", ["read 1", "swap 0", "swap 1", "swap 2", "swap 1, the first"])
def test_a_killed_import_is_repaired(point: str, project: Project, tmp_path: Path) -> None:
    if "first" not in point:
        import_photos(project, write_photos(tmp_path / "old", 1))
    old, more = tree(project.data), write_photos(tmp_path / "new", 1, seed=1)
    options = {"progress": partial(stop, point[:6], True)}
    process = get_context("spawn").Process(
        target=import_photos, args=(project, more), kwargs=options
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    report = import_photos(project, more)
    assert sum(report.imported.values()) == 6 * (point != "swap 2")
    assert sum(report.already_there.values()) == 6 * (point == "swap 2")
    assert {*tree(project.data).values()} == {*old.values(), *tree(more).values()}
    assert not project.staging.exists()


def test_a_file_of_the_inbox_is_read_once(project: Project, tmp_path: Path) -> None:
    folder, later = write_photos(tmp_path / "inbox", 2), write_photos(tmp_path / "later", 1, seed=9)

    def look(version: str | None = VERSION, name: str = "inbox") -> Inbox:
        return Inbox(project, name, list_folder(folder), version)

    first = look(None)
    assert len(first.new) == 12
    assert sum(first.import_new().imported.values()) == 12
    first.remember(VERSION)
    assert look().new == ()
    assert len(look("fedcba9876543210.dir").new) == len(look(name="elsewhere").new) == 12
    shutil.copy(folder / "3/0000.png", folder / "3/again.png")
    shutil.copy(later / "5/0000.png", folder / "5/0001.png")
    for name in (".DS_Store", "2/torn.png"):
        (folder / name).write_bytes(b"no picture")
    for _ in range(2):
        second = look()
        report = second.import_new()
        assert [file.origin for file in report.quarantined] == ["2/torn.png"]
        second.remember(VERSION)
    assert [file.origin for file in second.new] == ["2/torn.png"]
    assert len(stored_photos(project)) == 13
    shutil.copy(later / "2/0000.png", folder / "2/torn.png")
    assert look().import_new().imported == {("train", "2"): 1}
    project.inbox.write_text("not what we wrote")
    assert len(look().new) == 14
    with pytest.raises(SourceError, match=r"^HANDSIGNS_INBOX='.*is not a folder"):
        list_folder(project.root / "nowhere")
    with pytest.raises(SourceError, match="no folder named 0, 1, 2, 3, 4, 5"):
        Inbox(project, "wrong", list_folder(later / "5"), VERSION)


def test_objects_are_known_by_name_and_etag(project: Project, storage: Storage) -> None:
    def look() -> Inbox:
        listing = list_bucket(Storage(storage.address, folder="in"))
        return Inbox(project, "s3://bucket/in", listing, VERSION)

    assert look().new == ()
    names = [f"train/{label}/my photo ü.png" for label in range(6)]
    for name, content in zip(names, PNG, strict=True):
        storage.put(f"in/{name}", content)
    storage.put("inside/3/other.png", PNG[0])
    first = look()
    storage.remove(f"in/{names[0]}")
    report = first.import_new()
    assert report.imported == {("train", str(label)): 1 for label in range(1, 6)}
    assert [file.kind for file in report.quarantined] == ["cannot be read"]
    first.remember(VERSION)
    assert look().new == ()
    storage.put(f"in/{names[4]}", PNG[5])
    (rejected,) = look().import_new().quarantined
    assert (rejected.origin, rejected.reason) == (names[4], "same photo under two labels: 4 and 5")
    with pytest.raises(ServiceError, match=r"s3://no-such-bucket/.*does not exist"):
        list_bucket(Storage(replace(storage.address, bucket="no-such-bucket")))


def test_quarantine_takes_linear_time(project: Project, tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        bad = {f"0/{count}-{number}.png": b"text" for number in range(count)}
        folder = source(tmp_path / str(count), {"0/a.png": PNG[0], **bad})
        began = time.process_time()
        import_photos(project, folder)
        return time.process_time() - began

    assert seconds(1800) < 6 * seconds(600) + 0.5
