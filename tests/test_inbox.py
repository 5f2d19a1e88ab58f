"""The inbox: what is new there is imported once, and what is bad there harms nothing."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.data.directory import stored_photos
from tasks.data.importer import Inbox, list_bucket, list_folder
from tasks.errors import ServiceError, SourceError
from tasks.io import read_json
from tasks.project import Project
from tasks.services.s3 import Storage, StoredObject
from tests.fixtures.photos import with_params, write_photos

VERSION = "0123456789abcdef.dir"
Look = Callable[..., Inbox]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return with_params(tmp_path / "checkout")


@pytest.fixture
def look(project: Project, tmp_path: Path) -> Look:
    """`look(version)` into the folder `inbox` beside the checkout."""
    folder = tmp_path / "inbox"
    return lambda version=VERSION: Inbox(project, str(folder), list_folder(folder), version)


def test_a_file_is_read_once_while_it_stays_the_same(
    project: Project, look: Look, tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "inbox", per_class=2)
    first = look(None)
    assert len(first.new) == 12
    assert sum(first.import_new().imported.values()) == 12
    first.remember(VERSION)
    assert look().new == ()
    assert len(look("fedcba9876543210.dir").new) == 12
    assert len(Inbox(project, "elsewhere", list_folder(folder), VERSION).new) == 12
    shutil.copy(folder / "3/0000.png", folder / "3/again.png")
    later = write_photos(tmp_path / "later", per_class=1, seed=9)
    shutil.copy(later / "5/0000.png", folder / "5/0001.png")
    second = look()
    assert [item.origin for item in second.new] == ["3/again.png", "5/0001.png"]
    report = second.import_new()
    assert report.imported == {("train", "5"): 1}
    assert report.already_there == {("train", "3"): 1}
    assert len(stored_photos(project)) == 13
    project.inbox.write_text("not what we wrote")
    assert len(look().new) == 13


def test_bad_files_are_tried_again(project: Project, look: Look, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "inbox", per_class=1)
    for name in ("torn.png", "empty.jpg"):
        (folder / "2" / name).write_bytes(b"no picture" * (name == "torn.png"))
    (folder / ".DS_Store").write_bytes(b"clutter")

    def quarantined() -> list[str]:
        inbox = look()
        inbox.import_new()
        inbox.remember(VERSION)
        listed = read_json(project.quarantine / "quarantine.json")
        assert listed["source"] == str(folder)
        return [each["origin"] for each in listed["files"]]

    assert quarantined() == quarantined() == ["2/empty.jpg", "2/torn.png"]
    (folder / "six").mkdir()
    shutil.copy(folder / "1/0000.png", folder / "six/1.png")
    assert quarantined() == ["2/empty.jpg", "2/torn.png", "six/1.png"]
    later = write_photos(tmp_path / "later", per_class=1, seed=9)
    shutil.copy(later / "2/0000.png", folder / "2/torn.png")
    (folder / "2/empty.jpg").unlink()
    assert quarantined() == ["six/1.png"]
    assert len(stored_photos(project)) == 7


def test_a_mistaken_inbox_is_one_clear_line(
    tmp_path: Path, project: Project, storage: Storage
) -> None:
    with pytest.raises(SourceError, match=r"^HANDSIGNS_INBOX='.*is not a folder"):
        list_folder(tmp_path / "nowhere")
    (tmp_path / "wrong/holiday").mkdir(parents=True)
    (tmp_path / "wrong/holiday/beach.jpg").write_bytes(b"sea")
    listing = list_folder(tmp_path / "wrong")
    with pytest.raises(SourceError, match="no folder named 0, 1, 2, 3, 4, 5"):
        Inbox(project, "wrong", listing, VERSION)
    elsewhere = Storage(replace(storage.address, bucket="no-such-bucket"))
    with pytest.raises(ServiceError, match=r"s3://no-such-bucket/.*does not exist"):
        list_bucket(elsewhere, "in")
    assert not project.data.exists()


def test_objects_are_imported_by_name_and_etag(
    project: Project, storage: Storage, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", per_class=1)
    client = storage._client

    def put(key: str, content: bytes) -> None:
        client.put_object(Bucket=storage.address.bucket, Key=key, Body=content)

    def look() -> Inbox:
        return Inbox(project, "s3://bucket/in", list_bucket(storage, "in/"), VERSION)

    assert look().new == ()
    for label in range(6):
        content = (photos / f"{label}/0000.png").read_bytes()
        put(f"in/train/{label}/my photo ({label}) ü.png", content)
    put("inside/3/other.png", content)
    first = look()
    client.delete_object(Bucket=storage.address.bucket, Key="in/train/0/my photo (0) ü.png")
    report = first.import_new()
    assert report.imported == {("train", str(label)): 1 for label in range(1, 6)}
    assert [file.kind for file in report.quarantined] == ["cannot be read"]
    first.remember(VERSION)
    assert look().new == ()
    put("in/train/4/my photo (4) ü.png", content)
    changed = look()
    assert [file.origin for file in changed.new] == ["train/4/my photo (4) ü.png"]
    (rejected,) = changed.import_new().quarantined
    assert rejected.reason == "same photo under two labels: 4 and 5"


def test_a_key_that_leads_elsewhere_is_never_asked_for(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [
        StoredObject(f"in/{key}", 0)
        for key in ("3/fine.png", "../3/dots.png", "/3/empty.png", "3/")
    ]
    monkeypatch.setattr(Storage, "list", lambda *_: iter(listed))
    fault = "name: it has empty or dotted parts"
    found = [(entry.parts[-1], entry.fault) for entry, _ in list_bucket(storage, "in")]
    assert found == [("fine.png", None), ("dots.png", fault), ("empty.png", fault)]
