"""The inbox: what is new there is taken once, and what is bad there costs nothing held."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tasks.data.directory import stored_photos
from tasks.data.importer import import_photos
from tasks.data.inbox import Inbox, list_bucket, list_folder
from tasks.errors import ImageError, ServiceError, SourceError
from tasks.io import read_json, write_json
from tasks.project import Project
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.photos import write_photos

VERSION = "0123456789abcdef.dir"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "checkout")


@pytest.fixture
def look(project: Project, tmp_path: Path) -> Callable[..., Inbox]:
    """`look(version)` into the folder `inbox` beside the checkout."""
    folder = tmp_path / "inbox"
    return lambda version=VERSION: Inbox(project, str(folder), list_folder(folder), version)


def test_what_was_looked_at_is_not_read_again(
    project: Project, look: Callable[..., Inbox], tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "inbox", per_class=2)
    first = look(None)
    assert len(first.new) == 12
    report = first.import_new()
    assert sum(report.imported.values()) == 12
    first.remember(VERSION)
    assert look().new == ()
    shutil.copy(folder / "3/0000.png", folder / "3/again.png")
    write_photos(tmp_path / "later", per_class=1, seed=9)
    shutil.copy(tmp_path / "later/5/0000.png", folder / "5/0001.png")
    second = look()
    assert [item.origin for item in second.new] == ["3/again.png", "5/0001.png"]
    report = second.import_new()
    assert report.imported == {("train", "5"): 1}
    assert report.already_there == {("train", "3"): 1}
    assert len(stored_photos(project)) == 13
    assert len(list(folder.rglob("*.png"))) == 13


@pytest.mark.parametrize("seen", [[], None, "3"])
def test_a_spoilt_note_of_what_was_looked_at_counts_for_none(
    project: Project, look: Callable[..., Inbox], tmp_path: Path, seen: object
) -> None:
    write_photos(tmp_path / "inbox", per_class=1)
    first = look(None)
    first.import_new()
    first.remember(VERSION)
    write_json(project.inbox, read_json(project.inbox) | {"seen": seen})
    assert len(look().new) == 6


def test_a_file_that_could_not_be_read_is_tried_again(project: Project, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "inbox", per_class=1)
    listing = list_folder(folder)

    def fail(_limit: int) -> bytes:
        raise ImageError("cannot be read: Permission denied")

    (entry, stamp) = listing[0]
    shut = [(replace(entry, read=fail), stamp), *listing[1:]]
    first = Inbox(project, "inbox", shut, VERSION)
    assert sum(first.import_new().imported.values()) == 5
    first.remember(VERSION)
    again = Inbox(project, "inbox", listing, VERSION)
    assert [item.origin for item in again.new] == ["/".join(entry.parts)]
    assert sum(again.import_new().imported.values()) == 1


def test_another_version_of_the_data_or_another_place_is_looked_at_anew(
    project: Project, look: Callable[..., Inbox], tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "inbox", per_class=1)
    look(None).remember(VERSION)
    assert look().new == ()
    assert len(look("fedcba9876543210.dir").new) == 6
    assert len(Inbox(project, "elsewhere", list_folder(folder), VERSION).new) == 6
    project.inbox.write_text("not what we wrote")
    assert len(look().new) == 6


def test_bad_files_stay_in_the_list_until_they_are_mended_or_gone(
    project: Project, look: Callable[..., Inbox], tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "inbox", per_class=1)
    for name in ("torn.png", "empty.jpg"):
        (folder / "2" / name).write_bytes(b"no picture" * (name == "torn.png"))
    (folder / ".DS_Store").write_bytes(b"clutter")

    def take() -> list[str]:
        inbox = look()
        inbox.import_new()
        inbox.remember(VERSION)
        sources = read_json(project.quarantine / "quarantine.json")["sources"]
        assert set(sources) <= {str(folder)}
        return sorted(each["origin"] for files in sources.values() for each in files)

    assert take() == ["2/empty.jpg", "2/torn.png"]
    (folder / "six").mkdir()
    shutil.copy(folder / "1/0000.png", folder / "six/1.png")
    assert take() == ["2/empty.jpg", "2/torn.png", "six/1.png"]
    write_photos(tmp_path / "later", per_class=1, seed=9)
    shutil.copy(tmp_path / "later/2/0000.png", folder / "2/torn.png")
    (folder / "2/empty.jpg").unlink()
    assert take() == ["six/1.png"]
    assert len(stored_photos(project)) == 7
    copies = [path for path in project.quarantine.glob("*/*") if path.is_file()]
    assert [path.name.partition("-")[2] for path in copies] == ["1.png"]


def test_nothing_usable_leaves_what_is_held_even_where_it_should_be_replaced(
    project: Project, look: Callable[..., Inbox], tmp_path: Path
) -> None:
    held = write_photos(project.data / "train", per_class=1)
    before = sorted(path.name for path in held.rglob("*.png"))
    (tmp_path / "inbox/4").mkdir(parents=True)
    assert look().new == ()
    (tmp_path / "inbox/4/bad.png").write_bytes(b"no picture")
    report = look().import_new(replace=True)
    assert not report.usable
    assert len(report.quarantined) == 1
    assert sorted(path.name for path in held.rglob("*.png")) == before


def test_photos_replace_the_sample_where_that_is_asked_for(
    project: Project, look: Callable[..., Inbox], tmp_path: Path
) -> None:
    import_photos(project, write_photos(tmp_path / "sample", per_class=1, seed=1))
    write_photos(tmp_path / "inbox", per_class=2, seed=2)
    report = look().import_new(replace=True)
    assert report.removed == 6
    assert len(stored_photos(project)) == 12


def test_a_missing_or_mistaken_folder_is_one_clear_line(tmp_path: Path, project: Project) -> None:
    with pytest.raises(SourceError, match=r"^HANDSIGNS_INBOX='.*is not a folder"):
        list_folder(tmp_path / "nowhere")
    (tmp_path / "wrong/holiday").mkdir(parents=True)
    (tmp_path / "wrong/holiday/beach.jpg").write_bytes(b"sea")
    with pytest.raises(SourceError, match="no folder named 0, 1, 2, 3, 4, 5"):
        Inbox(project, "wrong", list_folder(tmp_path / "wrong"), VERSION)
    assert not project.root.exists()


def test_objects_are_taken_by_name_and_etag(
    project: Project, storage: Storage, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", per_class=1)
    client = storage._client

    def put(key: str, path: Path) -> None:
        client.put_object(Bucket=storage.address.bucket, Key=key, Body=path.read_bytes())

    def look() -> Inbox:
        return Inbox(project, "s3://bucket/in", list_bucket(storage, "in/"), VERSION)

    assert look().new == ()
    for label in range(6):
        put(f"in/train/{label}/my photo ({label}) ü.png", photos / f"{label}/0000.png")
    put("inside/3/other.png", photos / "3/0000.png")
    first = look()
    report = first.import_new()
    assert report.imported == {("train", str(label)): 1 for label in range(6)}
    assert report.quarantined == ()
    first.remember(VERSION)
    assert look().new == ()
    put("in/train/4/my photo (4) ü.png", photos / "5/0000.png")
    (changed,) = look().new
    assert changed.origin == "train/4/my photo (4) ü.png"
    (aside,) = look().import_new().quarantined
    assert aside.reason == "same photo under two labels: data/ has it as 5"


def test_a_key_that_leads_elsewhere_is_never_asked_for(s3: S3Address) -> None:
    keys = ("in/3/fine.png", "in/../3/dots.png", "in//3/empty.png", "in/3/")
    rows = "".join(f"<Contents><Key>{key}</Key><Size>0</Size></Contents>" for key in keys)

    class Lister(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"<ListBucketResult>{rows}</ListBucketResult>".encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Lister) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        entries = [
            entry for entry, _ in list_bucket(Storage(replace(s3, endpoint_url=address)), "in")
        ]
        server.shutdown()
    assert [(entry.parts[-1], entry.read is None) for entry in entries] == [
        ("fine.png", False),
        ("dots.png", True),
        ("empty.png", True),
    ]
    assert {entry.fault for entry in entries[1:]} == {"name: it has empty or dotted parts"}


def test_an_object_is_read_up_to_the_limit_and_may_be_gone(storage: Storage) -> None:
    storage.put("in/3/large.png", b"x" * 100_000)
    ((entry, _),) = list_bucket(storage, "in")
    assert entry.read is not None
    assert entry.read(10) == b"x" * 10
    for key in ("in/../other", "in//x", "./in"):
        with pytest.raises(ValueError, match="empty or dotted part"):
            storage.read_start(key, 10)


def test_a_bucket_that_is_missing_is_named(storage: Storage) -> None:
    elsewhere = Storage(replace(storage.address, bucket="no-such-bucket"))
    with pytest.raises(ServiceError, match=r"s3://no-such-bucket/.*does not exist"):
        list_bucket(elsewhere, "in")
